"""`hflow-rt sample`."""

import itertools
import math
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import (
    BackendOption,
    CudaGraphOption,
    DeviceOption,
    JsonOption,
    LabelOption,
    ModelArgument,
    StdOption,
    named,
    open_session,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked
from hflow_rt.limits import check_count
from hflow_rt.memory import need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@app.command()
def sample(
    model: ModelArgument = None,
    number: Annotated[int, typer.Option("-n", "--number", help="How many images.")] = 16,
    std: StdOption = None,
    seed: Annotated[int, typer.Option(help="Image i of a seed is the same on every backend and in any batch.")] = 0,
    first: Annotated[int, typer.Option(help="Index of the first image: --first 7 -n 1 is image 7 of the seed.")] = 0,
    label: LabelOption = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="A grid (.png, .jpg, .webp), or a folder for one file each."),
    ] = Path("samples.png"),
    latents: Annotated[Path | None, typer.Option(help="Also save the latents (.safetensors).")] = None,
    batch: Annotated[int, typer.Option(help="Images per call.")] = 16,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    cuda_graph: CudaGraphOption = None,
    json: JsonOption = False,
) -> None:
    """Draw images from the model.

    Example: hflow-rt sample --backend onnx --std 0.7 -n 16 -o samples.png
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import (
        check_folder,
        check_picture_name,
        check_picture_size,
        grid_size,
        to_uint8,
        write_pictures,
    )
    from hflow_rt.runtime.in_flight import in_flight
    from hflow_rt.runtime.latents.files import check_latents_name, save_latents
    from hflow_rt.runtime.latents.operations import concatenate

    check_count("the number of images", number)
    check_count("the batch", batch)
    if output.suffix:
        check_picture_name(output)
    if latents is not None:
        check_latents_name(latents)
    session = open_session(model, backend, device, json, cuda_graph)
    if output.suffix:
        check_picture_size(output, *grid_size(number, session.resolution))
    if latents is not None:
        numbers = number * sum(math.prod(shape) for shape in session.input_shapes.values())
        need(12 * numbers, f"the latents of {number:,} images", "ask for fewer, or omit --latents")
    if not output.suffix:
        check_folder(output, range(first, first + number))
    stds = std or session.std
    parts = session.draw(range(first, first + number), stds, seed, batch, label)
    starts = itertools.count(first, batch)
    turn = nullcontext() if session.side_by_side else Lock()

    def decode(item: "tuple[int, dict[str, Any]]") -> "tuple[dict[str, Any], NDArray[np.uint8]]":
        start, part = item
        with turn:
            found = session.forward(part)
        pixels = to_uint8(found)
        if not output.suffix:
            write_pictures(output, pixels, start)
        return part, pixels

    drawn, images, kept = 0, [], []
    decoded = in_flight(decode, zip(starts, parts, strict=False))
    for part, pixels in tracked(decoded, number, lambda done: len(done[1]), "sampling"):
        if output.suffix:
            images.append(pixels)
        if latents is not None:
            kept.append(part)
        drawn += len(pixels)
    where = write_pictures(output, np.concatenate(images)) if output.suffix else f"{output}/"
    if latents is not None:
        about = {
            "family": session.manifest.family,
            "model": session.manifest.checkpoint["sha256"],
            "seed": seed,
            "std": stds,
        }
        save_latents(latents, concatenate(kept), about)
    if json:
        print_json(
            {
                "images": drawn,
                "output": where,
                "seed": seed,
                "std": stds,
                "backend": session.backend,
                "bundle": str(session.bundle.path),
            }
        )
        return
    say(f"{drawn} images at std {' '.join(stds)}, seed {seed}: {where}")
    again = named(model, "--model ")
    say_next(f"hflow-rt interpolate{again} -o walk.gif", f"hflow-rt encode IMAGE{again} -o latents.safetensors")
