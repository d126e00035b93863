"""`hflow-rt walk`."""

from typing import Annotated

import typer

from hflow_rt.cli.latents import Asked, latent_command
from hflow_rt.cli.terminal import tracked
from hflow_rt.limits import check_count


@latent_command(
    "walk.webp", "seed", "std", "label", about=".webp, .gif, .mp4, or .png (a contact sheet, one row a segment)."
)
def walk(
    asked: Asked,
    rows: Annotated[int, typer.Option(help="Rows of walks side by side.")] = 2,
    columns: Annotated[int, typer.Option(help="Columns of walks side by side.")] = 3,
    keyframes: Annotated[int, typer.Option(help="Random images that each walk passes through.")] = 4,
    frames: Annotated[int, typer.Option(help="Frames from one keyframe to the next.")] = 24,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 24.0,
    closed: Annotated[bool, typer.Option("--closed/--open", help="Return to the first keyframe: a loop.")] = True,
    fix: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A latent that stays as in the first keyframe. Repeatable."),
    ] = None,
    mode: Annotated[str, typer.Option(help="slerp or lerp.")] = "slerp",
    space: Annotated[str, typer.Option(help="z, or another space of the model.")] = "z",
) -> None:
    """Walk at random through the latents: a video that loops without a seam.

    Example: hflow-rt walk --keyframes 4 --frames 24 -o walk.webp
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import check_picture_size, grid, grid_size, save_image, to_uint8
    from hflow_rt.runtime.images.video import check_animation, check_frames, kept, save_animation
    from hflow_rt.runtime.latents import latent_views as views

    check_count("the number of rows", rows)
    check_count("the number of columns", columns)
    output, sheet = asked.output, asked.output.suffix.lower() == ".png"
    check_animation(output, fps)
    session = asked.open()
    paths = rows * columns
    width, height = grid_size(paths, session.resolution, columns)
    if sheet:
        check_picture_size(output, frames * width, keyframes * height)
    else:
        check_frames(output, keyframes * frames, max(width, height))
    settings = {"closed": closed, "mode": mode, "space": space, "fixed": fix or []}
    drawn = {"std": asked.std or session.std, "seed": asked.seed, "option": asked.label}
    steps = views.walk(session, paths, keyframes, frames, **drawn, **settings)  # type: ignore[arg-type]
    total = (keyframes * frames if closed else (keyframes - 1) * frames + 1) * paths
    sheets = (np.asarray(grid(to_uint8(step), columns)) for step in tracked(steps, total, len, "walking"))
    shown = kept((sheet.reshape(1, *sheet.shape[:2], session.channels) for sheet in sheets), output)
    if sheet:
        save_image(output, grid(shown, columns=frames, scale=1))
    else:
        save_animation(output, shown, fps)
    held = f", {' '.join(fix)} fixed" if fix else ""
    line = f"{len(shown)} frames of {paths} walk{'s' if paths > 1 else ''} ({mode} in {space}{held}): {output}"
    report = {"frames": len(shown), "paths": paths, "keyframes": keyframes, **settings, "seed": asked.seed}
    asked.finish(report, [line], f"hflow-rt walk{asked.again} --fix {next(iter(session.latent_shapes))} -o fixed.webp")
