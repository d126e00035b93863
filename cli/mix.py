"""`hflow-rt mix`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    encoded,
    named,
    open_session,
    read_pictures,
    told,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.runtime.session import Session


@app.command(rich_help_panel=LATENTS)
def mix(
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="SEEDS", help="Seeds that give the coarse latents. Repeatable.", show_default="0-3"),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="SEEDS", help="Seeds that give the fine latents. Repeatable.", show_default="4-8"),
    ] = None,
    row_images: Annotated[
        list[Path] | None, typer.Option(help="Images instead, or a folder of them. Repeatable.", show_default=False)
    ] = None,
    column_images: Annotated[
        list[Path] | None, typer.Option(help="Images instead, or a folder of them. Repeatable.", show_default=False)
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The finest latent that rows give; by default they give the coarser half.",
            show_default=False,
        ),
    ] = None,
    from_rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Instead of --cut: one latent that rows give. Repeatable."),
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp).")] = Path("mix.png"),
    std: StdOption = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Mix styles: each cell has the coarse latents of its row's image and the fine ones of its column's.

    Example: hflow-rt mix --rows 0-3 --columns 4-8 -o mix.png
    """
    import numpy as np

    from hflow_rt.errors import DataError
    from hflow_rt.runtime import explore
    from hflow_rt.runtime.pictures import (
        Row,
        check_picture_name,
        check_picture_size,
        save_image,
        table,
        table_size,
        to_uint8,
    )

    check_picture_name(output)
    if cut is not None and from_rows:
        raise DataError("--cut and --from-rows both say what the rows give; keep one of them")
    session = open_session(model, backend, device, quiet=json)
    names = from_rows or explore.coarse_down_to(session, cut)
    down, row_pixels, row_latents = _sources(session, rows, row_images, "0-3", "row", std, label)
    across, column_pixels, column_latents = _sources(session, columns, column_images, "4-8", "column", std, label)
    check_picture_size(output, *table_size(len(across) + 1, len(down) + 1, session.resolution))
    corner = np.full((1, session.resolution, session.resolution, session.channels), 255, np.uint8)
    grid = [Row(np.concatenate([corner, to_uint8(column_pixels)]), captions=["", *across])]
    total = len(down) * len(across)
    for index in tracked(range(len(down)), total, lambda _: len(across), "mixing"):
        mixed = explore.style_row(session, explore.select(row_latents, index), column_latents, names)
        cells = np.concatenate([to_uint8(row_pixels[index : index + 1]), to_uint8(mixed)])
        grid.append(Row(cells, down[index]))
    save_image(output, table(grid))
    rest = [name for name in session.latent_shapes if name not in names]
    if json:
        print_json(
            {"output": str(output), "rows": down, "columns": across, "from_rows": list(names), "from_columns": rest}
        )
        return
    given = f"{' '.join(names)} of the row, {' '.join(rest) or 'nothing'} of the column"
    say(f"{len(down)} x {len(across)} mixes, {given}: {output}")
    finest = list(session.latent_shapes)[-2:][0]  # the last but one: with the last all is the row's
    say_next(f"hflow-rt mix{named(model, '--model ')} --cut {finest} -o finer.png")


def _sources(
    session: "Session",
    seeds: Sequence[str] | None,
    images: Sequence[Path] | None,
    default: str,
    what: str,
    std: Sequence[str] | None,
    label: str | None,
) -> "tuple[list[str], NDArray[np.float32], dict[str, NDArray[np.float32]]]":
    """Names, pixels and latents of one side."""
    from hflow_rt.errors import DataError
    from hflow_rt.runtime import explore

    if images:
        if seeds:
            raise DataError(f"--{what}s and --{what}-images both say what the {what}s are; keep one of them")
        names, pixels = read_pictures(images, session.resolution, choices=session.choices, channels=session.channels)
        return names, pixels, encoded(session, pixels, told(session, names, label))
    chosen = explore.parse_seeds(seeds or [default])
    latents = explore.latents_of_seeds(session, chosen, std or session.std, label)
    return [f"seed {seed}" for seed in chosen], session.forward(latents), latents
