"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "GRID",
    "PICTURE",
    "BackendOption",
    "ControlOption",
    "CudaGraphOption",
    "DeviceOption",
    "ImagesArgument",
    "JsonOption",
    "LabelOption",
    "ModelArgument",
    "ModelOption",
    "NumberOption",
    "RegionOption",
    "ResolutionOption",
    "SeedOption",
    "SplitOption",
    "StdOption",
    "StepsOption",
    "TensorOption",
]

PICTURE = "A picture (.png, .jpg, .webp)."
GRID = "A grid (.png, .jpg, .webp), or a folder for one file each."

_MODEL_HELP = (
    "A run, a bundle, or a name of 'info --models'; by default the latest run under ./runs, else a bundled one."
)
# such commands take it as --model, too, see `app`
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

ControlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="NAME=VALUE",
        help="Set a number that the model can be given; 'hflow-rt info' lists them. Repeatable.",
        show_default=False,
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        help="Of a model of many steps: how many to take, fewer being faster and worse; all by default.",
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
ResolutionOption = Annotated[
    int | None,
    typer.Option(
        help="Side of the images of a model that knows more of them than their pixels: a multiple of its own.",
        show_default=False,
    ),
]
RegionOption = Annotated[
    str | None,
    typer.Option(
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="A square part of the images of such a model, in shares of the whole from the top left.",
        show_default=False,
    ),
]
TensorOption = Annotated[
    str | None,
    typer.Option(
        "--in",
        metavar="NAME",
        help="A latent, or a tensor of another space of the model; by default the last of its first other space.",
        show_default=False,
    ),
]
ImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(help="Image files, folders or archives; by default samples.", show_default=False),
]
NumberOption = Annotated[int, typer.Option("-n", "--number", help="How many samples, or of the images.")]
SplitOption = Annotated[str, typer.Option(help="test (the held-out images), train or all.")]
