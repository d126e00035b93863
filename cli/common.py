"""What commands share: finding the model, opening it, and showing that something takes a while."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hflow_rt.cli.terminal import note, tracked
from hflow_rt.errors import DataError
from hflow_rt.limits import check_count
from hflow_rt.memory import need
from hflow_rt.names import quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.conditions import Choices
    from hflow_rt.runtime.bundle import Bundle
    from hflow_rt.runtime.session import Session

__all__ = [
    "LATENTS",
    "BackendOption",
    "CudaGraphOption",
    "DeviceOption",
    "ImagesArgument",
    "JsonOption",
    "LabelOption",
    "ModelArgument",
    "ModelOption",
    "PlaceOption",
    "SeedOption",
    "StdOption",
    "check_std",
    "encoded",
    "locate",
    "locate_bundle",
    "named",
    "open_session",
    "read_pictures",
    "shipped_pictures",
    "starting_points",
    "told",
    "warn_if_busy",
]

_MODEL_HELP = "A run or a bundle; by default the latest run under ./runs, else the bundled model."
ModelArgument = Annotated[Path | None, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
ModelOption = Annotated[Path | None, typer.Option("--model", "-m", help=_MODEL_HELP, show_default=False)]
BackendOption = Annotated[str, typer.Option("--backend", "-b", help="What runs the model: onnx, trt or torch.")]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda, or auto for the best that works; with onnx also tensorrt or rtx, where it has them.",
    ),
]
CudaGraphOption = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graph/--no-cuda-graph",
        help="Replay the work on a GPU instead of queueing it anew each time; trt does, onnx does not.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
StdOption = Annotated[
    list[str] | None,
    typer.Option(
        "--std",
        metavar="S|NAME=S",
        help="Multiply the prior's std, of all latents or of one; by default what the bundle says. Repeatable.",
        show_default=False,
    ),
]

LabelOption = Annotated[
    str | None,
    typer.Option(
        help="For a model of classes: the class of all these images. By default samples take each in turn, and "
        "images the one that their folder is named after.",
        show_default=False,
    ),
]
SeedOption = Annotated[int, typer.Option(help="Image i of a seed is the same on every backend and in any batch.")]
PlaceOption = Annotated[
    str | None,
    typer.Option(
        "--in",
        metavar="NAME",
        help="A latent, or a tensor of another space of the family (hflow: u1, the default).",
        show_default=False,
    ),
]
ImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(help="Image files, folders or archives; by default samples.", show_default=False),
]

LATENTS = "Latents"  # heading in the help of the commands that look into latents


def locate(model: Path | None, quiet: bool = False) -> Path:
    """`model`, or the latest run under ./runs, or the bundled model, which is then named on stderr."""
    from hflow_rt.assets import PRETRAINED, pretrained
    from hflow_rt.errors import CheckpointError
    from hflow_rt.runs import ROOT, latest_run

    if model is not None:
        return model
    try:
        return latest_run()
    except CheckpointError:
        if not quiet:
            note(f"no run under ./{ROOT}: this is {PRETRAINED}, the bundled model")
        return pretrained()


def locate_bundle(model: Path | None, quiet: bool = False) -> "Bundle":
    """The bundle of what `locate` finds; a line on stderr says if that run has newer weights. Raises `BundleError`."""
    from hflow_rt.runtime.bundle import find_bundle

    found = find_bundle(locate(model, quiet))
    if found.outdated is not None:
        note(f"warning: {found.outdated}")
    return found


def open_session(
    model: Path | None, backend: str, device: str, quiet: bool = False, cuda_graph: bool | None = None
) -> "Session":
    """Open the model and say on stderr what was opened, and once if nobody has proved it yet."""
    from hflow_rt.runtime.backends import check_backend
    from hflow_rt.runtime.session import open_bundle

    check_backend(backend, device)
    bundle = locate_bundle(model, quiet)
    session = open_bundle(bundle, backend, device, cuda_graph=cuda_graph)
    if not quiet:
        manifest = bundle.manifest
        note(f"{manifest.family} {manifest.size} from {bundle.path} on {session.backend}")
    if not session.verified:
        what, how = ("bundle", "") if session.engines is None else ("engine", f" --backend {backend}")
        note(
            f"warning: this {what} is unverified (parity failed or never ran); "
            f"see 'hflow-rt check {quoted(bundle.path)}{how}'"
        )
    return session


def read_pictures(
    paths: Sequence[Path],
    resolution: int,
    limit: int | None = None,
    choices: "Choices | None" = None,
    unused: dict[str, str] | None = None,
    channels: int = 3,
) -> tuple[list[str], "NDArray[np.float32]"]:
    """As of `hflow_rt.runtime.reading`; how many images cannot be used is told on stderr."""
    from hflow_rt.runtime.reading import read_pictures

    return read_pictures(paths, resolution, limit, choices, unused, note, channels)


def shipped_pictures(resolution: int, number: int, channels: int = 3) -> tuple[list[str], "NDArray[np.float32]"]:
    """Names and pixels, as of `read_pictures`, of `number` of the bundled test images, taken evenly.

    Raises `DataError` if they are too small for the model.
    """
    import numpy as np

    from hflow_rt.data.selection import select

    chosen = select(None, resolution, "test", number, channels)
    return chosen.names, chosen.pixels().astype(np.float32) / np.float32(255)


def encoded(
    session: "Session", pixels: "NDArray[np.float32]", conditions: "Mapping[str, NDArray[np.float32]]", batch: int = 16
) -> "dict[str, NDArray[np.float32]]":
    """Latents of images `[N, C, R, R]` in [0, 1], with progress; conditions: as of `told`."""
    from hflow_rt.runtime.latents import concatenate

    batches = [slice(start, start + batch) for start in range(0, len(pixels), batch)]
    size = lambda part: len(pixels[part])  # noqa: E731
    parts = [
        session.inverse(pixels[part], {name: rows[part] for name, rows in conditions.items()}).latents
        for part in tracked(batches, len(pixels), size, "encoding")
    ]
    return concatenate(parts)


def told(session: "Session", names: Sequence[str], label: str | None = None) -> "dict[str, NDArray[np.float32]]":
    """What the model is told of the images called `names`: `label`, or what their folders say. Raises `DataError`."""
    from hflow_rt.conditions import by_folder, of_option

    if label is not None:
        return of_option(session.choices, label, len(names))
    try:
        return by_folder(session.choices, names)
    except DataError as error:
        raise DataError(f"{error}; put it there, or say --label") from error


def starting_points(
    session: "Session",
    images: Sequence[Path] | None,
    number: int,
    seed: int,
    std: Sequence[str] | None,
    label: str | None,
) -> tuple[list[str], "NDArray[np.float32]", "dict[str, NDArray[np.float32]]"]:
    """Names, pixels `[N, C, R, R]` and latents of the first `number` images, or of as many samples of `seed`.

    Raises `DataError`.
    """
    from hflow_rt.runtime.latents import concatenate

    check_count("the number of images", number)
    check_std(std, not images)
    if images:
        names, pixels = read_pictures(images, session.resolution, number, session.choices, channels=session.channels)
        return names, pixels, encoded(session, pixels, told(session, names, label))
    need(
        16 * number * sum(math.prod(shape) for shape in session.input_shapes.values()),
        f"the latents of {number:,} images",
        "ask for fewer (-n)",
    )
    latents = concatenate(list(session.draw(range(number), std or session.std, seed, option=label)))
    return [f"sample {index}" for index in range(number)], session.forward(latents), latents


def check_std(std: Sequence[str] | None, samples: bool, instead: str = "omit it") -> None:
    """Raise `DataError`, which says what to do `instead`, for an std where nothing is sampled."""

    if std and not samples:
        raise DataError(f"--std is for samples, and these are images; {instead}")


def named(model: Path | None, option: str = "") -> str:
    """What a next command needs to find `model` again: nothing for the latest run."""
    return "" if model is None else f" {option}{quoted(model)}"


def warn_if_busy(quiet: bool) -> None:
    """Say so if what is measured next on this machine will mislead."""
    from hflow_rt.runtime.bench.machine import busy

    if (found := busy()) and not quiet:
        note(f"warning: {found}; what is chosen by measuring may not be the fastest")
