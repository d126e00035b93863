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
    read_pictures,
    told,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked
from hflow_rt.limits import check_count


@app.command()
def interpolate(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Two images; by default two samples are joined.", show_default=False),
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
    from itertools import islice

    from hflow_rt.errors import DataError
    from hflow_rt.runtime.latents import concatenate, ping_pong
    from hflow_rt.runtime.latents import interpolate as between
    from hflow_rt.runtime.pictures import to_uint8
    from hflow_rt.runtime.video import check_animation, check_frames, kept, save_animation

    check_count("the number of frames", frames, least=2)
    if not fps > 0:
        raise DataError(f"fps must be above 0, not {fps}")
    check_animation(output, fps)
    check_std(std, not images)
    session = open_session(model, backend, device, quiet=json)
    check_frames(output, frames, session.resolution)
    if images:
        names, pixels = read_pictures(images, session.resolution, choices=session.choices, channels=session.channels)
        if len(pixels) != 2:
            raise DataError(f"an interpolation joins two images, not {len(pixels)}")
        latents = session.inverse(pixels, told(session, names, label)).latents
    else:
        latents = next(session.draw([0, 1], std or session.std, seed, option=label))
    latents = session.into_space(space, latents)
    ends = [{name: values[i : i + 1] for name, values in latents.items()} for i in (0, 1)]
    path = between(ends[0], ends[1], frames, mode, session.joined(space), session.choices)
    batches = (concatenate(part) for part in iter(lambda: list(islice(path, 8)), []))
    decoded = (to_uint8(session.forward(session.from_space(space, part))) for part in batches)
    pictures = kept(tracked(decoded, frames, len, "decoding"), output)
    order = ping_pong(frames) if loop and output.suffix.lower() != ".png" else range(frames)
    save_animation(output, pictures, fps, order)
    if json:
        print_json({"output": str(output), "frames": len(order), "mode": mode, "space": space})
        return
    say(f"{len(order)} frames ({mode} in {space}): {output}")
    say_next(
        f"hflow-rt sample{named(model)}"
        if images
        else f"hflow-rt interpolate A.png B.png{named(model, '--model ')} -o walk.gif"
    )
