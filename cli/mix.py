"""`hflow-rt mix`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hflow_rt.cli.latents import Asked, Start, are_latents, latent_command
from hflow_rt.cli.terminal import tracked

if TYPE_CHECKING:
    from hflow_rt.runtime.session import Session

_ImagesOption = Annotated[
    list[Path] | None,
    typer.Option(help="Images instead, a folder of them, or a latents file. Repeatable.", show_default=False),
]


@latent_command("mix.png", "std", "label")
def mix(
    asked: Asked,
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="SEEDS", help="Seeds that give the coarse latents. Repeatable.", show_default="0-3"),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="SEEDS", help="Seeds that give the fine latents. Repeatable.", show_default="4-8"),
    ] = None,
    row_images: _ImagesOption = None,
    column_images: _ImagesOption = None,
    cut: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The finest latent that rows give, or NAME:COUNT for the first calls of a loop; by default they give"
            " the coarser half.",
            show_default=False,
        ),
    ] = None,
    from_rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Instead of --cut: one latent that rows give. Repeatable."),
    ] = None,
    slots: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SLOTS",
            help="Of a model whose layers have values of their own: the layers that rows give, such as 0-6.",
            show_default="the coarser half, where there is one latent",
        ),
    ] = None,
) -> None:
    """Mix styles: each cell has the coarse latents of its row's image and the fine ones of its column's.

    Example: hflow-rt mix --rows 0-3 --columns 4-8 -o mix.png
    """
    import numpy as np

    from hflow_rt.errors import DataError
    from hflow_rt.runtime.images.pictures import Row, save_image, table, to_uint8
    from hflow_rt.runtime.latents import latent_views as views
    from hflow_rt.runtime.latents.files import as_made

    if (cut is not None) + bool(from_rows) + bool(slots) > 1:
        raise DataError("--cut, --from-rows and --slots each say what the rows give; keep one of them")
    files = [path for images in (row_images or [], column_images or []) if are_latents(images) for path in images]
    session = as_made(asked.open_for_picture(), files)
    space = views.space_of_slots(session) if slots or (len(session.latent_shapes) == 1 and not cut) else None
    if slots and space is None:
        raise DataError("no layers of this model have values of their own; use --cut")
    chosen = [] if space is None else views.parse_slots(session, space, slots or [])
    names = from_rows or views.coarse_down_to(session, cut)
    down = _side(asked, session, space, rows, row_images, "0-3", "row")
    across = _side(asked, session, space, columns, column_images, "4-8", "column")
    width, height = len(across.names), len(down.names)
    asked.check_table(session, width + 1, height + 1)
    corner = np.full((1, session.resolution, session.resolution, session.channels), 255, np.uint8)
    grid = [Row(np.concatenate([corner, to_uint8(across.pixels)]), captions=["", *across.names])]
    for index in tracked(range(height), height * width, lambda _: width, "mixing"):
        row = views.select(down.latents, index)
        if space is None:
            mixed = views.style_row(session, row, across.latents, names)
        else:
            mixed = views.slots_row(session, space, row, across.latents, chosen)
        cells = np.concatenate([to_uint8(down.pixels[index : index + 1]), to_uint8(mixed)])
        grid.append(Row(cells, down.names[index]))
    save_image(asked.output, table(grid))
    rest = [name for name in session.levels if name not in names]
    given = f"{' '.join(names)} of the row, {' '.join(rest) or 'nothing'} of the column"
    if space is not None:
        given = f"slots {' '.join(map(str, chosen))} of the row"
        names, rest = [f"{space}:{slot}" for slot in chosen], []
    # the last but one: with the last all is the row's
    other = f"--cut {list(session.latent_shapes)[-2:][0]} -o finer.png" if space is None else "--slots 0 -o coarser.png"
    asked.finish(
        {"rows": down.names, "columns": across.names, "from_rows": list(names), "from_columns": rest},
        [f"{height} x {width} mixes, {given}: {asked.output}"],
        f"hflow-rt mix{asked.again} {other}",
    )


def _side(
    asked: Asked,
    session: "Session",
    space: str | None,
    seeds: Sequence[str] | None,
    images: Sequence[Path] | None,
    default: str,
    what: str,
) -> Start:
    """The images or samples of one side, as latents or as values of `space`."""
    from hflow_rt.errors import DataError
    from hflow_rt.runtime.latents import latent_views as views
    from hflow_rt.runtime.session import LATENT_SPACE

    if images:
        if seeds:
            raise DataError(f"--{what}s and --{what}-images both say what the {what}s are; keep one of them")
        if are_latents(images):
            return asked.values(session, images, space or LATENT_SPACE)[1]
        return _within(session, space, asked.encode(session, *asked.read(session, images)))
    chosen = views.parse_seeds(seeds or [default])
    latents = views.latents_of_seeds(session, chosen, asked.std or session.std, asked.label)
    return _within(session, space, Start([f"seed {seed}" for seed in chosen], session.forward(latents), latents))


def _within(session: "Session", space: str | None, found: Start) -> Start:
    return found if space is None else replace(found, latents=session.into_space(space, found.latents))
