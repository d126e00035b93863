"""`hflow-rt walk`."""

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
    named,
    open_session,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked
from hflow_rt.limits import check_count


@app.command(rich_help_panel=LATENTS)
def walk(
    model: ModelOption = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help=".webp, .gif, .mp4, or .png (a contact sheet, one row a segment).")
    ] = Path("walk.webp"),
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
    space: Annotated[str, typer.Option(help="z, or another space of the family (hflow: y0).")] = "z",
    seed: SeedOption = 0,
    std: StdOption = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Walk at random through the latents: a video that loops without a seam.

    Example: hflow-rt walk --keyframes 4 --frames 24 -o walk.webp
    """
    import numpy as np

    from hflow_rt.runtime import explore
    from hflow_rt.runtime.pictures import check_picture_size, grid, grid_size, save_image, to_uint8
    from hflow_rt.runtime.video import check_animation, check_frames, kept, save_animation

    check_count("the number of rows", rows)
    check_count("the number of columns", columns)
    check_animation(output, fps)
    session = open_session(model, backend, device, quiet=json)
    paths = rows * columns
    width, height = grid_size(paths, session.resolution, columns)
    if output.suffix.lower() == ".png":
        check_picture_size(output, frames * width, keyframes * height)
    else:
        check_frames(output, keyframes * frames, max(width, height))
    steps = explore.walk(
        session,
        paths,
        keyframes,
        frames,
        std=std or session.std,
        seed=seed,
        closed=closed,
        mode=mode,
        space=space,
        fixed=fix or (),
        option=label,
    )
    total = (keyframes * frames if closed else (keyframes - 1) * frames + 1) * paths
    sheets = (np.asarray(grid(to_uint8(step), columns)) for step in tracked(steps, total, len, "walking"))
    shown = kept((sheet.reshape(1, *sheet.shape[:2], session.channels) for sheet in sheets), output)
    if output.suffix.lower() == ".png":
        save_image(output, grid(shown, columns=frames, scale=1))
    else:
        save_animation(output, shown, fps)
    if json:
        print_json(
            {
                "output": str(output),
                "frames": len(shown),
                "paths": paths,
                "keyframes": keyframes,
                "closed": closed,
                "mode": mode,
                "space": space,
                "fixed": fix or [],
                "seed": seed,
            }
        )
        return
    held = f", {' '.join(fix)} fixed" if fix else ""
    say(f"{len(shown)} frames of {paths} walk{'s' if paths > 1 else ''} ({mode} in {space}{held}): {output}")
    coarsest = next(iter(session.latent_shapes))
    say_next(f"hflow-rt walk{named(model, '--model ')} --fix {coarsest} -o fixed.webp")
