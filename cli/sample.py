"""`hflow-rt sample`."""

import itertools
import math
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hflow_rt.cli.latents import Asked, latent_command, set_by
from hflow_rt.cli.options import (
    GRID,
    ControlOption,
    CudaGraphOption,
    ModelArgument,
    RegionOption,
    ResolutionOption,
    StepsOption,
)
from hflow_rt.cli.sharded import ProcessesOption, RayOption, ShardOption, ShardsOption, Sharing, in_shards
from hflow_rt.cli.terminal import tracked
from hflow_rt.limits import check_count
from hflow_rt.memory import need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@latent_command("samples.png", "number", "seed", "std", "label", about=GRID, panel=None, model=ModelArgument, number=16)
def sample(
    asked: Asked,
    first: Annotated[int, typer.Option(help="Index of the first image: --first 7 -n 1 is image 7 of the seed.")] = 0,
    latents: Annotated[Path | None, typer.Option(help="Also save the latents (.safetensors).")] = None,
    batch: Annotated[int, typer.Option(help="Images per call.")] = 16,
    control: ControlOption = None,
    steps: StepsOption = None,
    same_start: Annotated[bool, typer.Option(help="All images have the latents of the first; noise differs.")] = False,
    share_noise: Annotated[bool, typer.Option(help="All images have the noise of the first; latents differ.")] = False,
    trajectory: Annotated[
        Path | None,
        typer.Option(
            help="Also show how the images of a model of many steps come to be (.gif, .webp, .mp4; .png: a table).",
            show_default=False,
        ),
    ] = None,
    draw_pixels: Annotated[
        bool, typer.Option("--pixels", help="Draw each pixel of a model of distributions, instead of its mean.")
    ] = False,
    centre_of: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Pull samples towards the mean of N others, in the model's first space beside its latents.",
            show_default=False,
        ),
    ] = None,
    pull: Annotated[float, typer.Option(help="With --centre-of: what is left of their way from there.")] = 0.7,
    resolution: ResolutionOption = None,
    region: RegionOption = None,
    cuda_graph: CudaGraphOption = None,
    shards: ShardsOption = None,
    shard: ShardOption = None,
    processes: ProcessesOption = 1,
    ray: RayOption = None,
    files: Annotated[
        Literal["tar", "npz"],
        typer.Option(
            "--format",
            help="Of shards: tar of .png for webdataset, or npz as tools for distances read it.",
            rich_help_panel="Shards",
        ),
    ] = "tar",
) -> None:
    """Draw images from the model.

    Example: hflow-rt sample -n 16 --seed 1 -o samples.png
    """
    import numpy as np

    from hflow_rt.errors import DataError
    from hflow_rt.runtime.images.pictures import check_picture_name, check_pictures, to_uint8, write_pictures
    from hflow_rt.runtime.in_flight import in_flight
    from hflow_rt.runtime.latents.operations import concatenate
    from hflow_rt.runtime.noise import parse_controls
    from hflow_rt.runtime.session import LATENT_SPACE

    number, output = asked.number, asked.output
    check_count("the number of images", number)
    check_count("the batch", batch)
    if draw_pixels and centre_of is not None:
        raise DataError("--pixels and --centre-of exclude each other; keep one of them")
    if not math.isfinite(pull):
        raise DataError(f"--pull must be a number such as 0.7; found {pull}")
    if output.suffix:
        check_picture_name(output)
    if latents is not None:
        from hflow_rt.runtime.latents.files import about_model, check_latents_name, save_latents

        check_latents_name(latents)
    session = asked.open(cuda_graph, (resolution, region))
    session = session if steps is None else session.in_steps(steps)
    sharing = Sharing(shards, shard, processes, ray, asked.backend, asked.device)
    if sharing.asked:
        if first or latents or trajectory or draw_pixels or centre_of is not None or same_start or share_noise:
            raise DataError("samples in shards are the images of a seed, and nothing beside; omit other options")
        chosen = parse_controls(control or [])
        stds = list(asked.std or session.std)
        settings = {"seed": asked.seed, "std": stds, "label": asked.label, **set_by(chosen, steps)}
        session = session.with_controls(chosen)
        next(session.draw(range(1), stds or None, asked.seed, 1, asked.label))  # before anything is pinned
        in_shards(session, "sample", output, None, number, sharing, settings, files, asked.json)
        return
    indices = range(first, first + number)
    check_pictures(output, indices, session.resolution)
    if latents is not None:
        numbers = number * sum(math.prod(shape) for shape in session.input_shapes.values())
        need(12 * numbers, f"the latents of {number:,} images", "ask for fewer, or omit --latents")
    controls, stds = parse_controls(control or []), asked.std or session.std
    drawn_alike = {"same_start": same_start, "share_noise": share_noise}
    if trajectory is not None:
        from hflow_rt.runtime.images.trajectories import check_trajectory, save_trajectory

        check_trajectory(session, trajectory, number)
    parts = session.draw(indices, stds, asked.seed, batch, asked.label, **drawn_alike)
    space = LATENT_SPACE
    if centre_of is not None:
        from hflow_rt.runtime.latents import latent_views as views

        space = views.space_to_image(session)
        centre = views.centre(session, space, centre_of, stds, asked.seed, asked.label)
        parts = (views.pulled(centre, session.into_space(space, part), pull) for part in parts)
    turn = nullcontext() if session.side_by_side else Lock()

    def decode(item: "tuple[int, dict[str, Any]]") -> "tuple[dict[str, Any], NDArray[np.uint8]]":
        start, part = item
        with turn:
            if draw_pixels:
                found = session.drawn_pixels(part, controls, seed=asked.seed, first=start)
            else:
                found = session.decode(space, part, controls)
        pixels = to_uint8(found)
        if not output.suffix:
            write_pictures(output, pixels, start)
        return part, pixels

    images, kept = [], []
    decoded = in_flight(decode, zip(itertools.count(first, batch), parts, strict=False))
    for part, pixels in tracked(decoded, number, lambda done: len(done[1]), "sampling"):
        if output.suffix:
            images.append(pixels)
        if latents is not None:
            kept.append(part)
    where = write_pictures(output, np.concatenate(images)) if output.suffix else f"{output}/"
    drawn = {"seed": asked.seed, "std": stds} | set_by(controls, steps)
    drawn |= {} if centre_of is None else {"space": space, "centre_of": centre_of, "pull": pull}
    if latents is not None:
        save_latents(latents, concatenate(kept), about_model(session) | drawn)
    if trajectory is not None:
        (few,) = session.draw(indices[:batch], stds, asked.seed, batch, asked.label, **drawn_alike)
        states = tracked(session.trajectory(few, controls), session.steps, lambda _: 1, "following")
        save_trajectory(trajectory, states, session.steps)
    about = {"images": number, "output": where, **drawn, "backend": session.backend}
    asked.finish(
        about | {"bundle": str(session.bundle.path)},
        [
            f"{number} images" + (f" at std {' '.join(stds)}" if stds else "") + f", seed {asked.seed}: {where}",
            *([] if trajectory is None else [f"how they came to be: {trajectory}"]),
        ],
        f"hflow-rt interpolate{asked.again} -o walk.gif",
        *([f"hflow-rt encode IMAGE{asked.again} -o latents.safetensors"] if session.can("inverse") else []),
    )
