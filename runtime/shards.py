"""A job over many images, cut into shards that are whole or not there: on one machine or many, ended at any time.

The cut and all that decides a result are pinned in `plan.json`. A shard is written under another name, synced and
renamed, and then told of by a small file beside it. Whoever comes later does what is not done yet. Memory does not grow
with the job.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from hflow_rt.data.image_files import Skipped
from hflow_rt.data.image_source import ImageSource
from hflow_rt.data.resize import fit
from hflow_rt.errors import DataError
from hflow_rt.extras import needed
from hflow_rt.files import atomic_file, is_file, locked, sha256, unusable
from hflow_rt.manifest import LOG_PROB, graphs_of
from hflow_rt.memory import need
from hflow_rt.runtime.images.pictures import to_picture, to_uint8
from hflow_rt.runtime.latents.files import about_model, latents_file
from hflow_rt.runtime.latents.operations import concatenate
from hflow_rt.runtime.session import Session

__all__ = [
    "FORMATS",
    "Job",
    "Kind",
    "State",
    "cut",
    "forget",
    "is_done",
    "listed",
    "pinned",
    "read_job",
    "shard_name",
    "state",
    "work",
]

PLAN = "plan.json"
BATCH = 16
Kind = Literal["score", "encode", "sample"]
FORMATS: dict[Kind, tuple[str, ...]] = {"score": ("parquet",), "encode": ("safetensors",), "sample": ("tar", "npz")}


class Job(BaseModel):
    """What a folder of shards is of; whoever works at it must mean the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Kind
    files: str  # what a shard is, by its suffix
    family: str
    model: str  # sha256 of the weights
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
        if not is_file(out / PLAN) and (others := sorted(path.name for path in out.iterdir() if path.name[0] != ".")):
            raise DataError(f"{out} holds {others[0]} and no plan of shards; choose another folder")
        with tempfile.NamedTemporaryFile("w", dir=out, prefix=f".{PLAN}.") as file:
            file.write(job.model_dump_json(indent=1) + "\n")
            file.flush()
            os.chmod(file.name, 0o644)
            with suppress(FileExistsError):  # of several that begin at once one is the first
                os.link(file.name, out / PLAN)
    except OSError as error:
        raise unusable(out, error, "write") from error
    there = read_job(out)
    for name, wanted in job.model_dump().items():
        found = there.model_dump()[name]
        if found != wanted:
            raise DataError(f"{out} is of another job: its {name} is {found}, not {wanted}; choose another folder")


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
        if not alone or is_done(out, job, shard):
            return False
        for left in path.parent.glob(f".{path.stem}.*"):  # of one who was killed at it
            if left.suffix != ".lock":
                left.unlink(missing_ok=True)
        with atomic_file(path) as temporary:
            with open(temporary, "r+b") as file:
                images, refused = _WRITERS[job.files](session, job, cut(job, shard), source, file, told)
                file.flush()
                os.fsync(file.fileno())
            about = {"images": images, "refused": refused, "sha256": sha256(temporary)}
            about["bytes"] = temporary.stat().st_size
        _sync(out)
        with atomic_file(_beside(path)) as temporary:
            temporary.write_text(json.dumps(about) + "\n")
            _sync(temporary)
    return True


class _Row(NamedTuple):
    """A picture of the job, uint8 `[C, R, R]`, or why there is none."""

    name: str
    pixels: NDArray[np.uint8] | None
    reason: str | None


def _rows(session: Session, source: ImageSource, images: range) -> Iterator[list[_Row]]:
    """The pictures of a shard, a batch at a time."""
    batch: list[_Row] = []
    for name, picture in source.part(images):
        found = (
            picture if isinstance(picture, Skipped) else fit(picture, session.resolution, "center", session.channels)
        )
        batch.append(_Row(name, None, found.detail) if isinstance(found, Skipped) else _Row(name, found, None))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _inverse(session: Session, job: Job, rows: Sequence[_Row], first: int) -> Any:
    """The whole ones encoded; None where there are none."""
    pixels = [row.pixels for row in rows if row.pixels is not None]
    if not pixels:
        return None
    return session.inverse(
        np.stack(pixels).astype(np.float32) / np.float32(255), first=first, seed=job.settings["seed"]
    )


def _scores(
    session: Session, job: Job, images: range, source: Any, file: Any, told: Callable[[int], None]
) -> tuple[int, int]:
    """Likelihoods and their parts, a row a picture, as parquet."""
    with needed("pyarrow", "scores of many images need pyarrow; pip install 'hflow-rt[shards]'"):
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    manifest = session.manifest
    graphs = [manifest.graphs[name] for name in graphs_of(manifest.routes["inverse"])]
    names = [tensor.name for graph in graphs for tensor in graph.outputs if tensor.role == "score"]
    columns = [*(["bits_per_dim"] if LOG_PROB in names else []), *names]
    fields = [
        ("name", arrow.string()),
        *((name, arrow.float32()) for name in columns),
        ("reason", arrow.string()),
    ]
    schema = arrow.schema(fields)
    refused, first = 0, images.start
    with parquet.ParquetWriter(file, schema) as writer:
        for rows in _rows(session, source, images):
            found = _inverse(session, job, rows, first)
            whole = [index for index, row in enumerate(rows) if row.pixels is not None]
            values = {name: [None] * len(rows) for name in columns}
            for name in columns if whole else ():
                known = session.bits_per_dim(found.scores[LOG_PROB]) if name == "bits_per_dim" else found.scores[name]
                for index, value in zip(whole, known.tolist(), strict=True):
                    values[name][index] = value
            table = {"name": [row.name for row in rows], **values, "reason": [row.reason for row in rows]}
            writer.write_table(arrow.table(table, schema))
            refused, first = refused + len(rows) - len(whole), first + len(rows)
            told(len(rows))
    return len(images) - refused, refused


def _latents(
    session: Session, job: Job, images: range, source: Any, file: Any, told: Callable[[int], None]
) -> tuple[int, int]:
    """Latents of the whole ones, their names and scores, as a latents file."""
    size = 8 * len(images) * sum(int(np.prod(shape)) for shape in session.input_shapes.values())
    need(size, f"the latents of a shard of {len(images):,} images", "ask for more --shards")
    parts, scores, names, first = [], [], list[str](), images.start
    skipped: dict[str, str | None] = {}
    for rows in _rows(session, source, images):
        found = _inverse(session, job, rows, first)
        if found is not None:
            parts.append(found.latents)
            scores.append(found.scores)
        names += [row.name for row in rows if row.pixels is not None]
        skipped |= {row.name: row.reason for row in rows if row.pixels is None}
        first += len(rows)
        told(len(rows))
    if not parts:
        parts = [{name: np.zeros((0, *shape), np.float32) for name, shape in session.input_shapes.items()}]
    told_of = {name: values.tolist() for name, values in (concatenate(scores) if scores else {}).items()}
    about = about_model(session) | {"images": names, "skipped": skipped} | told_of
    file.write(latents_file(concatenate(parts), about))
    return len(names), len(skipped)


def _pictures(
    session: Session, job: Job, images: range, source: Any, file: Any, told: Callable[[int], None]
) -> tuple[int, int]:
    """Samples as a tar of .png and .json by number, as webdataset reads it."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for first, pixels in _samples(session, job, images, told):
            for index, image in enumerate(pixels, first):
                content = io.BytesIO()
                to_picture(image).save(content, "PNG")
                about = {"seed": job.settings["seed"], "image": index}
                for suffix, data in ((".png", content.getvalue()), (".json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{index:09d}{suffix}")  # without a time: the same bytes at any
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return len(images), 0


def _array(
    session: Session, job: Job, images: range, source: Any, file: Any, told: Callable[[int], None]
) -> tuple[int, int]:
    """Samples as one uint8 array `arr_0` `[n, R, R, C]`, which tools that measure distances read."""
    shape = (len(images), session.resolution, session.resolution, session.channels)
    with (
        zipfile.ZipFile(file, "w") as archive,
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for _, pixels in _samples(session, job, images, told):
            array.write(pixels.tobytes())
    return len(images), 0


def _samples(
    session: Session, job: Job, images: range, told: Callable[[int], None]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    first = images.start
    settings = job.settings
    for latents in session.draw(images, settings["std"] or None, settings["seed"], BATCH, settings["label"]):
        pixels = to_uint8(session.forward(latents))
        yield first, pixels
        first += len(pixels)
        told(len(pixels))


_WRITERS = {"parquet": _scores, "safetensors": _latents, "tar": _pictures, "npz": _array}


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
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
