"""`hflow-rt interpolate`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import (
    BackendOption,
    DeviceOption,
    JsonOption,
    LabelOption,
    ModelOption,
    StdOption,
    check_std,
    named,
    open_session,
    print_json,
    read_pictures,
    say_next,
    told,
    tracked,
)


@app.command()
def interpolate(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Two images; without them two samples are joined.", show_default=False),
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help=".png (a strip), .gif, .webp or .mp4.")] = Path(
        "interpolation.png"
    ),
    frames: Annotated[int, typer.Option(help="From one end to the other, both included.")] = 12,
    mode: Annotated[str, typer.Option(help="lerp or slerp.")] = "lerp",
    space: Annotated[
        str, typer.Option(help="z, or another space of the family (hflow: y0, the end vector itself).")
    ] = "z",
    seed: Annotated[int, typer.Option(help="Without images: join samples 0 and 1 of this seed.")] = 0,
    std: StdOption = None,
    label: LabelOption = None,
    fps: Annotated[float, typer.Option(help="Frames per second of an animation.")] = 12.0,
    loop: Annotated[bool, typer.Option(help="Animations go there and back without a stop.")] = True,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Walk between two images, or two samples, through the latents.

    Example: hflow-rt interpolate a.png b.png --mode slerp --frames 24 -o walk.gif
    """
    import numpy as np

    from hflow_rt.errors import DataError
    from hflow_rt.runtime.latents import concatenate, ping_pong
    from hflow_rt.runtime.latents import interpolate as between
    from hflow_rt.runtime.pictures import to_uint8
    from hflow_rt.runtime.video import check_animation, save_animation

    if frames < 2:
        raise DataError(f"an interpolation needs at least 2 frames, not {frames}")
    if not fps > 0:
        raise DataError(f"fps must be above 0, not {fps}")
    check_animation(output, fps)
    check_std(std, not images)
    session = open_session(model, backend, device, quiet=json)
    if images:
        names, pixels = read_pictures(images, session.resolution, choices=session.choices)
        if len(pixels) != 2:
            raise DataError(f"an interpolation joins two images, not {len(pixels)}")
        latents = session.inverse(pixels, told(session, names, label)).latents
    else:
        latents = next(session.draw([0, 1], std or session.std, seed, option=label))
    latents = session.into_space(space, latents)
    ends = [{name: values[i : i + 1] for name, values in latents.items()} for i in (0, 1)]
    path = between(ends[0], ends[1], frames, mode, session.joined(space), session.choices)
    batches = [concatenate(path[start : start + 8]) for start in range(0, frames, 8)]
    pictures = []
    for part in tracked(batches, frames, lambda p: len(next(iter(p.values()))), "decoding"):
        pictures.append(to_uint8(session.forward(session.from_space(space, part))))
    shown = np.concatenate(pictures)
    if loop and output.suffix.lower() != ".png":
        shown = shown[ping_pong(frames)]
    save_animation(output, shown, fps)
    if json:
        print_json({"output": str(output), "frames": len(shown), "mode": mode, "space": space})
        return
    print(f"{len(shown)} frames ({mode} in {space}): {output}")
    say_next(
        f"hflow-rt sample{named(model)}"
        if images
        else f"hflow-rt interpolate A.png B.png{named(model, '--model ')} -o walk.gif"
    )
