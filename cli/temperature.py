"""`hflow-rt temperature`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import (
    LATENTS,
    BackendOption,
    DeviceOption,
    ImagesArgument,
    JsonOption,
    LabelOption,
    ModelOption,
    SeedOption,
    StdOption,
    named,
    open_session,
    starting_points,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked

_DEFAULT = "0,0.25,0.5,0.6,0.7,0.8,0.9,1"


@app.command(rich_help_panel=LATENTS)
def temperature(
    images: ImagesArgument = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T|FROM:TO:COUNT",
            help="What to multiply all latents by; 1 leaves the image. Repeatable.",
            show_default=_DEFAULT,
        ),
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp).")] = Path(
        "temperature.png"
    ),
    number: Annotated[int, typer.Option("-n", "--number", help="How many samples, or of the images.")] = 4,
    seed: SeedOption = 0,
    std: StdOption = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Encode images, multiply all their latents by one temperature after another, and decode.

    Example: hflow-rt temperature photo.png --at 0:1:5 -o temperature.png
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import (
        Row,
        check_picture_name,
        check_picture_size,
        save_image,
        table,
        table_size,
        to_uint8,
    )
    from hflow_rt.runtime.latents import latent_views as views
    from hflow_rt.runtime.latents.attributes import parse_gains

    check_picture_name(output)
    factors = parse_gains(at or [_DEFAULT], "temperature")
    session = open_session(model, backend, device, quiet=json)
    if not images:
        check_picture_size(output, *table_size(len(factors) + 1, number, session.resolution))
    names, pixels, latents = starting_points(session, images, number, seed, std, label)
    steps = views.temperatures(session, latents, factors)
    columns = [to_uint8(pixels)]
    columns += [to_uint8(step) for step in tracked(steps, len(factors) * len(names), len, "decoding")]
    captions = ["original", *(f"{factor:g}" for factor in factors)]
    shown = np.stack(columns, axis=1)
    save_image(output, table([Row(row, Path(name).name, captions) for name, row in zip(names, shown, strict=True)]))
    changes = [float(np.sqrt(np.mean((column / 255.0 - columns[0] / 255.0) ** 2))) for column in columns[1:]]
    if json:
        print_json({"output": str(output), "images": names, "temperatures": factors, "rms_change": changes})
        return
    for factor, change in zip(captions[1:], changes, strict=True):
        say(f"temperature {factor}: pixels differ by {change:.4f} (RMS, in 0 .. 1)")
    say(f"{len(names)} images at {len(factors)} temperatures: {output}")
    say_next(f"hflow-rt zeroing{named(model, '--model ')} -o zeroing.png")
