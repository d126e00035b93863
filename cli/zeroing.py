"""`hflow-rt zeroing`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import (
    LATENTS,
    BackendOption,
    DeviceOption,
    JsonOption,
    LabelOption,
    ModelOption,
    SeedOption,
    StdOption,
    check_std,
    encoded,
    named,
    open_session,
    shipped_pictures,
    starting_points,
    told,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked


@app.command(rich_help_panel=LATENTS)
def zeroing(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, folders or archives; by default bundled test images.", show_default=False),
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp).")] = Path(
        "zeroing.png"
    ),
    number: Annotated[int, typer.Option("-n", "--number", help="How many samples, or of the images.")] = 8,
    samples: Annotated[bool, typer.Option("--samples", help="Take samples of a seed instead of images.")] = False,
    seed: SeedOption = 0,
    std: StdOption = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Show what is left of images as one latent after another is set to zero, fine to coarse.

    Example: hflow-rt zeroing photos/ -n 8 -o zeroing.png
    """
    import numpy as np

    from hflow_rt.errors import DataError
    from hflow_rt.runtime import explore
    from hflow_rt.runtime.pictures import (
        check_picture_name,
        check_picture_size,
        labelled_rows,
        save_image,
        table_size,
        to_uint8,
    )

    check_picture_name(output)
    if images and samples:
        raise DataError("images and --samples both say what to start from; keep one of them")
    check_std(std, samples, "ask for samples with --samples or omit it")
    session = open_session(model, backend, device, quiet=json)
    if samples:
        check_picture_size(output, *table_size(number, len(session.latent_shapes) + 1, session.resolution))
    if images or samples:
        names, pixels, latents = starting_points(session, images, number, seed, std, label)
    else:
        names, pixels = shipped_pictures(session.resolution, number, session.channels)
        latents = encoded(session, pixels, told(session, names, label))
    steps = len(session.latent_shapes) + 1
    rows, changes = [], {}
    for zero, decoded in tracked(
        explore.zeroing(session, latents), steps * len(names), lambda _: len(names), "decoding"
    ):
        what = "all zero (mean image)" if len(zero) == steps - 1 else f"-{' '.join(zero)}" if zero else "original"
        rows.append((what, to_uint8(decoded if zero else pixels)))
        changes[what] = float(np.sqrt(np.mean((decoded - pixels) ** 2)))
    save_image(output, labelled_rows(rows))
    if json:
        print_json({"output": str(output), "images": names, "rms_change": changes})
        return
    for what, change in changes.items():
        say(f"{what}: pixels differ by {change:.4f} (RMS, in 0 .. 1)")
    say(f"{len(names)} images: {output}")
    say_next(f"hflow-rt heatmap{named(model, '--model ')} -o heatmap.png")
