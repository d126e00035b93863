"""A job over many images, cut into shards that are whole or not there: on one machine or many, ended at any time.

The cut and all that decides a result are pinned in `plan.json`. A shard is written under another name, synced and
renamed, and then told of by a small file beside it. Whoever comes later does what is not done yet. Memory does not grow
with the job.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from hflow_rt.data.image_source import ImageSource
from hflow_rt.errors import DataError
from hflow_rt.files import atomic_file, is_file, locked, sha256, unusable
from hflow_rt.names import quoted
from hflow_rt.runtime.session import Session
from hflow_rt.runtime.shard_files import write_encoded, write_sampled

__all__ = [
    "Job",
    "Kind",
    "State",
    "cut",
    "forget",
    "is_begun",
    "is_done",
    "listed",
    "pinned",
    "read_job",
    "shard_name",
    "state",
    "work",
]

PLAN = "plan.json"
Kind = Literal["score", "encode", "sample"]
_WORDS = {"files": "format", "images": "number of images", "inputs": "list of inputs", "shards": "number of shards"}


class Job(BaseModel):
    """What a folder of shards is of; whoever works at it must mean the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Kind
    files: str  # what a shard is, by its suffix
    family: str
    model: str  # `Manifest.identity` of what runs
    backend: str
    images: int
    inputs: str | None  # sha256 of the names and sizes of what is read, in its order
    shards: int
    settings: dict[str, Any]  # std, seed, controls, ..., as the command was told


class State(NamedTuple):
    """How far a job is: numbers of shards from 1, and the rows of those that are done."""

    done: tuple[int, ...]
    missing: tuple[int, ...]
    damaged: tuple[int, ...]
    images: int
    refused: int


def cut(job: Job, shard: int) -> range:
    """The images of a shard, 1 .. `job.shards`; all are as large as any other, but for one."""
    return range(job.images * (shard - 1) // job.shards, job.images * shard // job.shards)


def shard_name(job: Job, shard: int) -> str:
    """Its file."""
    return f"{shard:05d}-of-{job.shards:05d}.{job.files}"


def listed(source: ImageSource) -> str:
    """What stands for the inputs in a plan: their names and sizes, in their order."""
    digest = hashlib.sha256()
    for name, size in source.listing:
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def pinned(out: Path, job: Job) -> None:
    """Write the plan of a new job into `out`, or compare it with the one there. Raises `DataError` for another."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in out.iterdir() if path.name[0] != ".")
        if there and PLAN not in there:
            raise DataError(f"{out} holds {there[0]} and no plan of shards; choose another folder")
        with tempfile.NamedTemporaryFile("w", dir=out, prefix=f".{PLAN}.") as file:
            file.write(job.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            with suppress(FileExistsError):  # of several that begin at once one is the first
                os.link(file.name, out / PLAN)
        _sync(out)
    except OSError as error:
        raise unusable(out, error, "write") from error
    plan, wanted = read_job(out).model_dump(), job.model_dump()
    for each in (plan, wanted):
        each |= each.pop("settings")  # which are compared one by one
    for name in {**plan, **wanted}:
        if plan.get(name) != wanted.get(name):
            raise DataError(
                f"{out} is of another job: its {_WORDS.get(name, name)} is {plan.get(name)}, not {wanted.get(name)};"
                f" say what 'hflow-rt shards {quoted(out)}' shows, or choose another folder"
            )


def read_job(out: Path) -> Job:
    """The plan of a folder of shards. Raises `DataError`."""
    try:
        return Job.model_validate_json((out / PLAN).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{out} has no {PLAN}; name the folder of a job with --shards") from None
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{out / PLAN} is no plan of this version ({type(error).__name__}); begin another folder"
        ) from error


def state(out: Path, job: Job, verify: bool = True) -> State:
    """What is done; with `verify` every byte of it is read."""
    done, missing, damaged, images, refused = [], [], [], 0, 0
    for shard in range(1, job.shards + 1):
        told = _told(out, job, shard)
        if told is None:
            missing.append(shard)
        elif verify and (
            not is_file(out / shard_name(job, shard)) or sha256(out / shard_name(job, shard)) != told["sha256"]
        ):
            damaged.append(shard)
        else:
            done.append(shard)
            images, refused = images + told["images"], refused + told["refused"]
    return State(tuple(done), tuple(missing), tuple(damaged), images, refused)


def is_begun(out: Path) -> bool:
    """Whether a folder has a plan."""
    return is_file(out / PLAN)


def is_done(out: Path, job: Job, shard: int) -> bool:
    """Whether a shard is there and as long as it was."""
    told, path = _told(out, job, shard), out / shard_name(job, shard)
    return told is not None and is_file(path) and path.stat().st_size == told["bytes"]


def forget(out: Path, job: Job, shard: int) -> None:
    """Have a shard done again by the next who works."""
    _beside(out / shard_name(job, shard)).unlink(missing_ok=True)


def work(
    session: Session,
    out: Path,
    job: Job,
    shard: int,
    source: ImageSource | None,
    told: Callable[[int], None] = lambda count: None,
) -> bool:
    """Do a shard that is not done; False where it is, or where somebody else is at it.

    source: the images, but of samples. told: hears of every batch. Raises `DataError` where it cannot be written.
    """
    path = out / shard_name(job, shard)
    with locked(path.with_name(f".{path.name}.lock")) as alone:
        if alone is False or is_done(out, job, shard):
            return False
        for left in path.parent.glob(f".{path.stem}.*") if alone else ():  # of one who was killed at it
            if left.suffix != ".lock":
                left.unlink(missing_ok=True)
        with atomic_file(path) as temporary:
            with open(temporary, "r+b") as file:
                images, refused = _write(session, job, cut(job, shard), source, file, told)
                file.flush()
                os.fsync(file.fileno())
            about = {"images": images, "refused": refused, "sha256": sha256(temporary)}
            about["bytes"] = temporary.stat().st_size
        _sync(out)
        with atomic_file(_beside(path)) as temporary:
            temporary.write_text(json.dumps(about) + "\n")
            _sync(temporary)
    return True


def _write(
    session: Session, job: Job, images: range, source: ImageSource | None, file: Any, told: Callable[[int], None]
) -> tuple[int, int]:
    """Write a shard; how many images are in it, and how many could not be used."""
    if job.kind == "sample":
        return write_sampled(session, job.settings, job.files, images, file, told)
    assert source is not None
    return write_encoded(session, job.settings, job.files, source, images, file, told)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _told(out: Path, job: Job, shard: int) -> dict[str, Any] | None:
    """What is known of a shard that is done."""
    try:
        about = json.loads(_beside(out / shard_name(job, shard)).read_text())
        return about if about.keys() == {"images", "refused", "sha256", "bytes"} else None
    except (OSError, ValueError, AttributeError):
        return None


def _sync(path: Path) -> None:
    """On disk, names and all, before it is told of."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # which has no handles of folders
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
