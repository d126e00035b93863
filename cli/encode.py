"""`hflow-rt encode` and `hflow-rt decode`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.latents import Asked, latent_command
from hflow_rt.cli.opening import named
from hflow_rt.cli.options import GRID
from hflow_rt.cli.terminal import note, tracked
from hflow_rt.names import quoted

_SHOWN = 8  # images


@latent_command("latents.safetensors", "label", about="Where the latents go (.safetensors).", panel=None)
def encode(
    asked: Asked,
    images: Annotated[list[Path], typer.Argument(help="Image files, folders or archives.")],
    picture: Annotated[Path | None, typer.Option(help="Also write originals over their reconstructions.")] = None,
) -> None:
    """Map images to latents, exactly, with their log-probability.

    Example: hflow-rt encode photo.png -o latents.safetensors --picture reconstruction.png
    """
    from hflow_rt.manifest import LOG_PROB
    from hflow_rt.runtime.images.pictures import check_picture_name, labelled_rows, save_image, to_uint8
    from hflow_rt.runtime.latents.files import about_model, check_latents_name, save_latents
    from hflow_rt.runtime.latents.latent_views import select

    output = asked.output
    check_latents_name(output)
    if picture is not None:
        check_picture_name(picture)
    session = asked.open()
    unused: dict[str, str] = {}
    found = asked.encode(session, *asked.read(session, images, unused=unused))
    about = {"images": found.names, "skipped": unused}
    scores = {name: values.tolist() for name, values in found.scores.items()}
    save_latents(output, found.latents, about_model(session) | about | scores)
    if picture is not None:
        again = to_uint8(session.forward(select(found.latents, 0, _SHOWN)))
        save_image(picture, labelled_rows([("original", to_uint8(found.pixels[:_SHOWN])), ("decoded", again)]))
    measured = LOG_PROB in scores
    bits = session.bits_per_dim(found.scores[LOG_PROB]).tolist() if measured else []
    lines = [f"{name}: {value:.3f} bits/dim (plug-in estimate)" for name, value in zip(found.names, bits, strict=False)]
    what = f"latents of {len(found.names)} images: {output}" + (f"; reconstruction: {picture}" if picture else "")
    report = about | ({"bits_per_dim": bits} if measured else {})
    asked.finish(report, [*lines[:_SHOWN], what], f"hflow-rt decode {quoted(output)}{asked.again} -o decoded.png")


@latent_command("decoded.png", about=GRID, panel=None)
def decode(
    asked: Asked,
    latents: Annotated[Path, typer.Argument(help="A latents file of encode, project or sample.")],
) -> None:
    """Map latents back to images.

    Example: hflow-rt decode latents.safetensors -o decoded.png
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import check_pictures, to_uint8, write_pictures
    from hflow_rt.runtime.latents import latent_views as views
    from hflow_rt.runtime.latents.files import load_latents
    from hflow_rt.runtime.latents.operations import check_latents
    from hflow_rt.runtime.session import LATENT_SPACE

    session = asked.open()
    values, about = load_latents(latents)
    space = about.get("space", LATENT_SPACE)
    check_latents(values, session.space_shapes(space), str(latents))
    if about.get("model") not in (None, session.manifest.checkpoint["sha256"]):
        note(f"warning: {latents} was made by another training state of this kind of model")
    controls = about.get("controls", {})  # which the latents may depend on
    count = views.count(values)
    check_pictures(asked.output, range(count), session.resolution)
    parts = tracked(views.batches(values), count, views.count, "decoding")
    where = write_pictures(
        asked.output, np.concatenate([to_uint8(session.decode(space, part, controls)) for part in parts])
    )
    report = {"images": count, "output": where}
    asked.finish(report, [f"{count} images: {where}"], f"hflow-rt sample{named(asked.model)}")
