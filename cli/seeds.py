"""`hflow-rt seeds`."""

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
    StdOption,
    named,
    open_session,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked
from hflow_rt.limits import check_count


@app.command(rich_help_panel=LATENTS)
def seeds(
    seeds: Annotated[
        list[str] | None, typer.Argument(help="Numbers and ranges, such as 0-15 20 31.", show_default="0-15")
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp).")] = Path("seeds.png"),
    columns: Annotated[
        int | None, typer.Option(help="Images in a row; by default as many as rows.", show_default=False)
    ] = None,
    std: StdOption = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Show the first image of each seed with the seed under it.

    Example: hflow-rt seeds 0-15 20 31 -o seeds.png
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import (
        captioned,
        check_picture_name,
        check_picture_size,
        grid_size,
        save_image,
        to_uint8,
    )
    from hflow_rt.runtime.latents import latent_views as views

    check_picture_name(output)
    if columns is not None:
        check_count("the number of columns", columns)
    chosen = views.parse_seeds(seeds or ["0-15"])
    session = open_session(model, backend, device, quiet=json)
    check_picture_size(output, *grid_size(len(chosen), session.resolution, columns))
    stds = std or session.std
    parts = list(views.batches(views.latents_of_seeds(session, chosen, stds, label)))
    size = lambda part: len(next(iter(part.values())))  # noqa: E731
    images = [to_uint8(session.forward(part)) for part in tracked(parts, len(chosen), size, "sampling")]
    save_image(output, captioned(np.concatenate(images), [str(seed) for seed in chosen], columns))
    if json:
        print_json({"output": str(output), "seeds": chosen, "std": stds})
        return
    say(f"{len(chosen)} seeds at std {' '.join(stds)}: {output}")
    again = "".join(f" --std {one}" for one in std or ())
    say_next(f"hflow-rt sample{named(model)} --seed {chosen[-1]} -n 1{again} -o one.png")
