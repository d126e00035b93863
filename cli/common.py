"""What commands share: finding the model, opening it, and showing that something takes a while."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.runtime.bundle import Bundle
    from hflow_rt.runtime.session import Session

__all__ = [
    "BackendOption",
    "DeviceOption",
    "JsonOption",
    "ModelArgument",
    "ModelOption",
    "StdOption",
    "locate_bundle",
    "named",
    "need_training_extra",
    "open_session",
    "print_json",
    "read_pictures",
    "say_next",
    "status",
    "tracked",
    "write_pictures",
]

_MODEL_HELP = "A run or a bundle; without it the latest run under ./runs."
ModelArgument = Annotated[Path | None, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
ModelOption = Annotated[Path | None, typer.Option("--model", "-m", help=_MODEL_HELP, show_default=False)]
BackendOption = Annotated[str, typer.Option("--backend", "-b", help="What runs the model: onnx or torch.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto for the best that works.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
StdOption = Annotated[
    list[str] | None,
    typer.Option("--std", metavar="S|NAME=S", help="Multiply the prior's std, of all latents or of one. Repeatable."),
]

T = TypeVar("T")

_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".npy")


def locate_bundle(model: Path | None) -> "Bundle":
    """The bundle of `model` or of the latest run. Raises `BundleError` or `CheckpointError`."""
    from hflow_rt.runs import resolve_run
    from hflow_rt.runtime.bundle import find_bundle

    return find_bundle(model if model is not None else resolve_run(None))


def open_session(model: Path | None, backend: str, device: str, quiet: bool = False) -> "Session":
    """Open the model and say on stderr what was opened, and once if nobody has proved it yet."""
    from hflow_rt.runtime.session import check_backend, open_bundle

    check_backend(backend, device)
    bundle = locate_bundle(model)
    session = open_bundle(bundle, backend, device)
    if not quiet:
        manifest = bundle.manifest
        print(
            f"{manifest.family} {manifest.resolution}x{manifest.resolution} from {bundle.path} on {session.backend}",
            file=sys.stderr,
        )
    if not bundle.manifest.verified:
        print(
            f"warning: this bundle is unverified (parity failed or never ran); see 'hflow-rt check {bundle.path}'",
            file=sys.stderr,
        )
    return session


def need_training_extra(*packages: str) -> None:
    """Raise `BackendUnavailable` unless all `packages` of the `train` extra are installed."""
    from importlib.util import find_spec

    from hflow_rt.errors import BackendUnavailable

    for package in packages:
        if find_spec(package) is None:
            raise BackendUnavailable(f"this command needs {package}: pip install 'hflow-rt[train]'")


def read_pictures(
    paths: Sequence[Path], resolution: int, limit: int | None = None
) -> tuple[list[str], "NDArray[np.float32]"]:
    """Names and pixels `[N, 3, R, R]` in [0, 1] of image files, folders and archives, the first `limit` of them.

    Raises `DataError`.
    """
    import numpy as np

    from hflow_rt.errors import DataError
    from hflow_rt.runtime.pictures import read_image

    names: list[str] = []
    images: list[NDArray[np.float32]] = []
    for path in paths:
        if path.is_dir() or path.suffix.lower() in _ARCHIVES or ".tar" in path.suffixes:
            from hflow_rt.data.dataset import open_dataset

            found = open_dataset(path, resolution)
            skipped = {reason: count for reason, count in found.skipped.items() if reason != "not an image"}
            if skipped:
                counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
                print(f"{len(found)} images in {path}; not used: {counts}", file=sys.stderr)
            names += found.names[:limit]
            images += list(found.pixels(range(len(found))[:limit]).astype(np.float32) / 255)
        else:
            names.append(path.name)
            images.append(read_image(path, resolution))
    if not images:
        raise DataError("no images given; name at least one file, folder or archive")
    return names[:limit], np.stack(images[:limit])


def write_pictures(output: Path, images: "NDArray[np.uint8]", start: int = 0) -> str:
    """Write uint8 `[N, R, R, 3]` as one grid if `output` names an image file, else one file each in that folder."""
    from PIL import Image

    from hflow_rt.runtime.pictures import grid, save_image

    if output.suffix:
        save_image(output, grid(images))
        return str(output)
    for index, image in enumerate(images):
        save_image(output / f"{start + index:06d}.png", Image.fromarray(image))
    return f"{output}/"


def named(model: Path | None, option: str = "") -> str:
    """What a next command needs to find `model` again: nothing for the latest run."""
    return "" if model is None else f" {option}{model}"


def say_next(*commands: str) -> None:
    """Close with what is useful now."""
    for index, command in enumerate(commands):
        print(("next: " if index == 0 else "      ") + command)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=1))


@contextmanager
def status(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show what is being done: a spinner on a terminal, a plain line each when piped, nothing when quiet."""
    if quiet:
        yield lambda text: None
    elif sys.stderr.isatty():
        from rich.console import Console

        started = time.monotonic()
        with Console(stderr=True).status("starting") as spinner:
            yield lambda text: spinner.update(f"{text} ({time.monotonic() - started:.0f} s)")
    else:
        yield lambda text: print(text, file=sys.stderr)


def tracked(items: Iterable[T], total: int, size: Callable[[T], int], label: str) -> Iterator[T]:
    """Yield `items`, on a terminal with rate and time left; `size` says how many of `total` an item stands for."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, done = bar.add_task(label, total=total, rate=""), 0
        for item in items:
            yield item
            done += size(item)
            bar.update(task, completed=done, rate=f"{done / max(time.monotonic() - started, 1e-9):.1f} images/s")
