"""`hflow-rt interpolate`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.latents import Asked, are_latents, latent_command
from hflow_rt.cli.opening import named
from hflow_rt.cli.terminal import tracked
from hflow_rt.limits import check_count


@latent_command("interpolation.png", "seed", "std", "label", about=".png (a strip), .gif, .webp or .mp4.", panel=None)
def interpolate(
    asked: Asked,
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Two images, or a latents file of two; by default samples 0 and 1 of the seed are joined.",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="From one end to the other, both included.")] = 12,
    mode: Annotated[str, typer.Option(help="lerp or slerp.")] = "lerp",
    space: Annotated[
        str | None, typer.Option(help="z, or another space of the model.", show_default="z, or that of a latents file")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of an animation.")] = 12.0,
    loop: Annotated[bool, typer.Option(help="Animations go there and back without a stop.")] = True,
) -> None:
    """Walk between two images, or two samples, through the latents.

    Example: hflow-rt interpolate a.png b.png --mode slerp --frames 24 -o walk.gif
    """
    from hflow_rt.errors import DataError
    from hflow_rt.runtime.images.pictures import to_uint8
    from hflow_rt.runtime.images.video import check_animation, check_frames, kept, save_animation
    from hflow_rt.runtime.latents import latent_views as views
    from hflow_rt.runtime.latents.files import as_made
    from hflow_rt.runtime.latents.operations import ping_pong
    from hflow_rt.runtime.session import LATENT_SPACE

    check_count("the number of frames", frames, least=2)
    if not fps > 0:
        raise DataError(f"fps must be above 0, not {fps}")
    output = asked.output
    check_animation(output, fps)
    asked.check_std(not images)
    session = asked.open()
    check_frames(output, frames, session.resolution)
    if images and are_latents(images):
        session = as_made(session, images)
        space, found = asked.values(session, images, space)
        if len(found.names) != 2:
            raise DataError(f"an interpolation joins two, and these files hold {len(found.names)}")
        ends = found.latents
    elif images:
        names, pixels = asked.read(session, images)
        if len(pixels) != 2:
            raise DataError(f"an interpolation joins two images, not {len(pixels)}")
        ends = session.into_space(space or LATENT_SPACE, asked.encode(session, names, pixels).latents)
    else:
        drawn = views.samples(session, 2, asked.std, asked.seed, asked.label)
        ends = session.into_space(space or LATENT_SPACE, drawn)
    space = space or LATENT_SPACE
    decoded = (to_uint8(step) for step in views.between(session, ends, frames, mode, space, entered=True))
    pictures = kept(tracked(decoded, frames, len, "decoding"), output)
    order = ping_pong(frames) if loop and output.suffix.lower() != ".png" else range(frames)
    save_animation(output, pictures, fps, order)
    others = f"hflow-rt interpolate A.png B.png{asked.again} -o walk.gif"
    asked.finish(
        {"frames": len(order), "mode": mode, "space": space},
        [f"{len(order)} frames ({mode} in {space}): {output}"],
        f"hflow-rt sample{named(asked.model)}" if images else others,
    )
