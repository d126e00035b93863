"""`hflow-rt seeds`."""

from typing import Annotated

import typer

from hflow_rt.cli.latents import Asked, latent_command
from hflow_rt.cli.opening import named
from hflow_rt.cli.terminal import tracked
from hflow_rt.limits import check_count


@latent_command("seeds.png", "std", "label")
def seeds(
    asked: Asked,
    seeds: Annotated[
        list[str] | None, typer.Argument(help="Numbers and ranges, such as 0-15 20 31.", show_default="0-15")
    ] = None,
    columns: Annotated[
        int | None, typer.Option(help="Images in a row; by default as many as rows.", show_default=False)
    ] = None,
) -> None:
    """Show the first image of each seed with the seed under it.

    Example: hflow-rt seeds 0-15 20 31 -o seeds.png
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import captioned, check_picture_size, grid_size, save_image, to_uint8
    from hflow_rt.runtime.latents import latent_views as views

    if columns is not None:
        check_count("the number of columns", columns)
    chosen = views.parse_seeds(seeds or ["0-15"])
    session = asked.open_for_picture()
    check_picture_size(asked.output, *grid_size(len(chosen), session.resolution, columns))
    stds = asked.std or session.std
    parts = list(views.batches(views.latents_of_seeds(session, chosen, stds, asked.label)))
    images = [to_uint8(session.forward(part)) for part in tracked(parts, len(chosen), views.count, "sampling")]
    save_image(asked.output, captioned(np.concatenate(images), [str(seed) for seed in chosen], columns))
    again = "".join(f" --std {one}" for one in asked.std or ())
    following = f"hflow-rt sample{named(asked.model)} --seed {chosen[-1]} -n 1{again} -o one.png"
    line = f"{len(chosen)} seeds{' at std ' + ' '.join(stds) if stds else ''}: {asked.output}"
    asked.finish({"seeds": chosen, "std": stds}, [line], following)
