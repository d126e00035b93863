"""What the commands that work in shards share: their options, the job, who does it, and the end."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hflow_rt.cli.terminal import note, print_json, say, say_next, tracked
from hflow_rt.errors import DataError
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from hflow_rt.runtime.session import Session
    from hflow_rt.runtime.shards import Job, Kind

__all__ = [
    "KeepOption",
    "ProcessesOption",
    "RayOption",
    "ShardOption",
    "ShardsOption",
    "Sharing",
    "continued",
    "in_shards",
    "parse_shards",
]

_SHARDS = "Shards"  # heading in the help
_LOOK = 0.2  # seconds from one look at what other processes have done to the next

ShardsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=99_999,
        help="How many files to cut the work into, in the folder -o; what is there is not done again.",
        show_default=False,
        rich_help_panel=_SHARDS,
    ),
]
ShardOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="K/N",
        help="Do this shard alone, of 1 to N, as one of many machines. Repeatable.",
        show_default=False,
        rich_help_panel=_SHARDS,
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Scores and latents to write, such as log_prob,end; or all. By default scores and small coarse latents of "
        "'score', and all of 'encode'.",
        show_default=False,
        rich_help_panel=_SHARDS,
    ),
]
ProcessesOption = Annotated[
    int,
    typer.Option(min=1, max=1024, help="Of one thread each, on this machine.", rich_help_panel=_SHARDS),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Have the Ray cluster at HOST:PORT, ray://HOST:PORT, auto or local do the shards.",
        show_default=False,
        rich_help_panel=_SHARDS,
    ),
]


class Sharing(NamedTuple):
    """Which shards, and who does them, as the options were given; backend and device as those of the session."""

    shards: int | None
    chosen: Sequence[str] | None
    processes: int
    ray: str | None
    backend: str
    device: str

    @property
    def asked(self) -> bool:
        """Whether any of it was."""
        return self.shards is not None or bool(self.chosen) or self.ray is not None


def parse_shards(shards: int | None, chosen: Sequence[str] | None) -> tuple[int, list[int]]:
    """How many shards there are, and which to do, all by default. Raises `DataError`."""
    numbers = []
    for text in chosen or []:
        number, slash, count = text.partition("/")
        if not (number.isdecimal() and (count.isdecimal() or not slash)):
            raise DataError(f"a shard is K/N such as 3/16; found '{text}'")
        if slash and shards not in (None, int(count)):
            raise DataError(f"--shards {shards} and --shard {text} differ; keep one of them")
        shards = int(count) if slash else shards
        numbers.append(int(number))
    if shards is None or shards < 1:
        raise DataError("say how many shards there are: --shards N, or --shard K/N")
    if wrong := [number for number in numbers if not 1 <= number <= shards]:
        raise DataError(f"shards are numbered 1 to {shards}; found {wrong[0]}")
    return shards, numbers or list(range(1, shards + 1))


def continued(job: "Job", out: Path, source: Path | None, model: Path) -> str:
    """The command that goes on with a job, its plan all but where images and model are."""
    how, sampled = job.settings, job.kind == "sample"
    named = [quoted(model)] if sampled else [f"--model {quoted(model)}"]
    words = ["hflow-rt", job.kind, *(named if sampled else [quoted(source)]), f"--shards {job.shards}"]
    words += [f"-n {job.images}"] if sampled else [f"--keep {','.join(how['keep'])}"]
    words += [] if job.kind == "score" else [f"--format {job.files}", f"--seed {how['seed']}"]
    words += [f"--std {quoted(std)}" for std in how.get("std", ())]
    words += [f"--control {quoted(name)}={value}" for name, value in how.get("controls", {}).items()]
    words += [f"--steps {how['steps']}"] if "steps" in how else []
    words += [f"--label {quoted(how['label'])}"] if how["label"] is not None else []
    return " ".join([*words, f"-o {quoted(out)}", *([] if sampled else named)])


def in_shards(
    session: "Session",
    kind: "Kind",
    out: Path,
    source: Path | None,
    count: int | None,
    sharing: Sharing,
    settings: dict[str, Any],
    files: str,
    json: bool,
) -> None:
    """Do the shards that are asked for and not done, and say how far the job is.

    source: where the images are; count: of samples.
    """
    from contextlib import nullcontext

    from hflow_rt.assets import is_installed
    from hflow_rt.data.image_files import looks_like_image
    from hflow_rt.data.sources import open_source
    from hflow_rt.limits import check_seed
    from hflow_rt.runtime.shard_files import check_classes
    from hflow_rt.runtime.shards import Job, is_begun, is_done, listed, pinned, state

    number, mine = parse_shards(sharing.shards, sharing.chosen)
    check_seed(settings["seed"])
    if looks_like_image(out.name) or out.suffix in (".safetensors", f".{files}"):
        raise DataError(f"shards go into a folder; say -o, such as -o {quoted(out.stem)}/")
    if sharing.ray is not None and sharing.processes > 1:
        raise DataError("--ray and --processes exclude each other; keep one of them")
    with nullcontext() if source is None else open_source(source) as images:
        total = (count or 0) if images is None else len(images)
        if total < number and not is_begun(out):
            raise DataError(f"{total:,} images cannot be cut into {number:,} shards; ask for fewer")
        if images is not None:
            check_classes(session, settings, images)
        job = Job(
            kind=kind,
            files=files,
            family=session.manifest.family,
            model=session.manifest.identity(session.engines),
            backend=session.backend,
            images=total,
            inputs=None if images is None else listed(images),
            shards=number,
            settings=settings,
        )
        pinned(out, job)
        left = [shard for shard in mine if not is_done(out, job, shard)]
        failed = 0
        if sharing.ray is not None and left:
            _by_ray(sharing, session, out, job, left, source, json)
        elif sharing.processes > 1 and len(left) > 1:
            failed = _by_others(out, job, left, min(sharing.processes, len(left)))
        else:
            _by_us(session, out, job, left, images, json)
    found = state(out, job, verify=False)
    report = {"output": str(out), "shards": number, "done": len(found.done), "images": found.images}
    if json:
        print_json(report | {"refused": found.refused, "missing": list(found.missing)})
    else:
        say(
            f"{len(found.done)} of {number} shards, {found.images:,} of {total:,} images"
            + (f", {found.refused:,} refused" if found.refused else "")
            + f": {out}/"
        )
        path = session.bundle.path
        model = Path(path.name) if is_installed(path) else path
        say_next(f"hflow-rt shards {quoted(out)}", *([continued(job, out, source, model)] if found.missing else []))
    if failed or not set(mine) <= set(found.done):
        raise typer.Exit(1)


def _by_us(session: "Session", out: Path, job: "Job", shards: Sequence[int], images: Any, quiet: bool) -> None:
    from hflow_rt.runtime.shards import cut, work

    total = sum(len(cut(job, shard)) for shard in shards)

    def counts() -> Any:
        for shard in shards:
            found: list[int] = []
            if not work(session, out, job, shard, images, found.append) and not quiet:
                note(f"shard {shard} is done, or somebody else is at it")
            yield from found

    for _ in tracked(counts(), total, lambda count: count, "working"):
        pass


def _by_ray(
    sharing: Sharing, session: "Session", out: Path, job: "Job", shards: Sequence[int], source: Path | None, quiet: bool
) -> None:
    from contextlib import closing

    from hflow_rt.runtime.ray_jobs import Opening, in_tasks
    from hflow_rt.runtime.shards import cut

    opening = Opening.of(out, session, sharing.backend, sharing.device, source)
    total = sum(len(cut(job, shard)) for shard in shards)
    with closing(in_tasks(sharing.ray or "auto", opening, job, shards, (lambda line: None) if quiet else note)) as done:
        for _ in tracked(done, total, lambda shard: len(cut(job, shard)), "working"):
            pass


def _by_others(out: Path, job: "Job", shards: Sequence[int], processes: int) -> int:
    """This very command once more for each process, with its share of the shards; how many did not end well.

    Of what they say only what ends one is told.
    """
    from hflow_rt.runtime.shards import cut, is_done

    words = _without(_without(sys.argv[1:], "--processes"), "--shard")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        running, said = [], []
        for first in range(processes):
            mine = [word for shard in shards[first::processes] for word in ("--shard", f"{shard}/{job.shards}")]
            command = [sys.executable, "-m", "hflow_rt.cli", *words, *mine]
            said.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said[-1]))
            stack.callback(running[-1].wait)
            stack.callback(running[-1].terminate)

        def done() -> Iterator[int]:
            left = list(shards)
            while left and any(process.poll() is None for process in running):
                time.sleep(_LOOK)
                found = [shard for shard in left if is_done(out, job, shard)]
                yield from found
                left = [shard for shard in left if shard not in found]

        for _ in tracked(done(), sum(len(cut(job, one)) for one in shards), lambda one: len(cut(job, one)), "working"):
            pass
        failed = [file for process, file in zip(running, said, strict=True) if process.wait() != 0]
        for file in failed:
            file.seek(0)
            note(([line for line in file.read().splitlines() if line] or ["error: it was killed"])[-1])
    if failed:
        note(f"error: {len(failed)} of {processes} processes did not end well; run this again to do what is left")
    return len(failed)


def _without(words: Sequence[str], option: str) -> list[str]:
    """The words without an option and its values."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == option:
            skip = True
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept
