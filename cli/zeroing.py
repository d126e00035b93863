"""`hflow-rt zeroing`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.latents import Asked, latent_command
from hflow_rt.cli.terminal import tracked


@latent_command("zeroing.png", "number", "seed", "std", "label", number=8)
def zeroing(
    asked: Asked,
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, folders or archives; by default bundled test images.", show_default=False),
    ] = None,
    samples: Annotated[bool, typer.Option("--samples", help="Take samples of a seed instead of images.")] = False,
) -> None:
    """Show what is left of images as one latent after another is set to zero, fine to coarse.

    Example: hflow-rt zeroing photos/ -n 8 -o zeroing.png
    """
    import numpy as np

    from hflow_rt.data.selection import select
    from hflow_rt.errors import DataError, NoInverse
    from hflow_rt.runtime.images.pictures import labelled_rows, save_image, to_uint8
    from hflow_rt.runtime.latents import latent_views as views

    if images and samples:
        raise DataError("images and --samples both say what to start from; keep one of them")
    asked.check_std(samples, "ask for samples with --samples or omit it")
    session = asked.open_for_picture()
    steps = len(session.levels) + 1
    if samples:
        asked.check_table(session, asked.number, steps)
    if images or samples:
        start = asked.start(session, images)
    else:
        if not session.can("inverse"):
            raise NoInverse(f"{session.manifest.absent['inverse']}; or start from samples with --samples")
        chosen = select(None, session.resolution, "test", asked.number, session.channels)
        start = asked.encode(session, chosen.names, chosen.pixels().astype(np.float32) / np.float32(255))
    rows, changes = [], {}
    count = len(start.names)
    for zero, decoded in tracked(views.zeroing(session, start.latents), steps * count, lambda _: count, "decoding"):
        what = "all zero (mean image)" if len(zero) == steps - 1 else f"-{' '.join(zero)}" if zero else "original"
        rows.append((what, to_uint8(decoded if zero else start.pixels)))
        changes[what] = float(np.sqrt(np.mean((decoded - start.pixels) ** 2)))
    save_image(asked.output, labelled_rows(rows))
    lines = [f"{what}: pixels differ by {change:.4f} (RMS, in 0 .. 1)" for what, change in changes.items()]
    lines.append(f"{count} images: {asked.output}")
    asked.finish({"images": start.names, "rms_change": changes}, lines, f"hflow-rt heatmap{asked.again} -o heatmap.png")
