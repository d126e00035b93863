"""`hflow-rt temperature`."""

from typing import Annotated

import typer

from hflow_rt.cli.latents import Asked, latent_command
from hflow_rt.cli.options import ImagesArgument
from hflow_rt.cli.terminal import tracked

_DEFAULT = "0,0.25,0.5,0.6,0.7,0.8,0.9,1"


@latent_command("temperature.png", "number", "seed", "std", "label")
def temperature(
    asked: Asked,
    images: ImagesArgument = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T|FROM:TO:COUNT",
            help="What to multiply all latents by; 1 leaves the image. Repeatable.",
            show_default=_DEFAULT,
        ),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(
            metavar="CONTROL",
            help="Give this control the values of --at instead, such as a generator's truncation.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Encode images, multiply all their latents by one temperature after another, and decode.

    Example: hflow-rt temperature photo.png --at 0:1:5 -o temperature.png
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import to_uint8
    from hflow_rt.runtime.latents import latent_views as views
    from hflow_rt.runtime.latents.attributes import parse_gains

    factors = parse_gains(at or [_DEFAULT], "temperature")
    session = asked.open_for_picture()
    if not images:
        asked.check_table(session, len(factors) + 1, asked.number)
    start = asked.start(session, images)
    steps = views.temperatures(session, start.latents, factors, of)
    columns = [to_uint8(start.pixels)]
    columns += [to_uint8(step) for step in tracked(steps, len(factors) * len(start.names), len, "decoding")]
    captions = ["original", *(f"{factor:g}" for factor in factors)]
    asked.save_columns(start.names, columns, captions)
    changes = [float(np.sqrt(np.mean((column / 255.0 - columns[0] / 255.0) ** 2))) for column in columns[1:]]
    lines = [
        f"temperature {factor}: pixels differ by {change:.4f} (RMS, in 0 .. 1)"
        for factor, change in zip(captions[1:], changes, strict=True)
    ]
    lines.append(f"{len(start.names)} images at {len(factors)} temperatures: {asked.output}")
    report = {"images": start.names, "temperatures": factors, "rms_change": changes}
    asked.finish(report, lines, f"hflow-rt zeroing{asked.again} -o zeroing.png")
