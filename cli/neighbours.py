"""`hflow-rt neighbours`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hflow_rt.cli.latents import Asked, latent_command
from hflow_rt.cli.options import SplitOption, TensorOption
from hflow_rt.cli.terminal import note, tracked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.data.selection import Selection
    from hflow_rt.runtime.session import Session

_BATCH = 16


@latent_command("neighbours.png", "seed", "std", "label")
def neighbours(
    asked: Asked,
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Images to look for; by default samples.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Where to look: a folder, zip, tar or .npy; by default the bundled images.", show_default=False
        ),
    ] = None,
    split: SplitOption = "all",
    count: Annotated[int, typer.Option("-k", "--count", help="Neighbours of each image.")] = 6,
    tensor: TensorOption = None,
    samples: Annotated[int, typer.Option(help="Without images: how many samples.")] = 4,
) -> None:
    """Find the images whose encodings are nearest, and for comparison those whose pixels are.

    Example: hflow-rt neighbours photo.png --data photos/ -k 6 -o neighbours.png
    """
    import numpy as np

    from hflow_rt.conditions import class_folder
    from hflow_rt.data.selection import select
    from hflow_rt.runtime.images.pictures import Row, from_uint8, save_image, table, to_uint8
    from hflow_rt.runtime.latents.nearest import Nearest, find_tensor, points

    asked.check_std(not images)
    session = asked.open_for_picture()
    if not images:
        asked.check_table(session, count + 1, 2 * samples)
    where = find_tensor(session, tensor)
    searched = select(data, session.resolution, split, channels=session.channels)
    if searched.images.unused:
        note(f"not used of {searched.source}: {searched.images.left_out}")
    found, seen = [(class_folder(session.conditions, data) if data else "") + name for name in searched.names], 0
    known = _of_set(asked, session, found)
    if images:
        start = asked.encode(session, *asked.read(session, images), only=where.only)
    else:
        drawn = replace(asked, number=samples).start(session, None)
        # as they would be read from a file, so that samples and images are encoded alike
        conditions = {name: drawn.latents[name] for name in session.conditions}
        start = asked.encode(session, drawn.names, from_uint8(to_uint8(drawn.pixels)), conditions, only=where.only)
    nearest = {
        where.name: Nearest(points(session, start.latents, where), count),
        "pixels": Nearest(start.pixels, count),
    }
    for pixels in tracked(_batches(searched), len(searched), len, "encoding"):
        part = {name: rows[seen : seen + len(pixels)] for name, rows in known.items()}
        nearest[where.name].add(points(session, session.inverse(pixels, part, only=where.only).latents, where))
        seen += len(pixels)
        nearest["pixels"].add(pixels)
    rows, report = [], []
    for index, name in enumerate(start.names):
        first, caption = to_uint8(start.pixels[index : index + 1]), f"{Path(name).name}\nquery"
        entry: dict[str, object] = {"image": name}
        for space, result in nearest.items():
            hits = result.indices[index]
            pairs = [(found[hit], float(d)) for hit, d in zip(hits, result.distances[index], strict=True)]
            entry[space] = [{"image": hit, "distance": distance} for hit, distance in pairs]
            captions = [caption, *(f"{Path(hit).name}\n{distance:.3g}" for hit, distance in pairs)]
            rows.append(Row(np.concatenate([first, searched.pixels(hits).transpose(0, 2, 3, 1)]), space, captions))
            first, caption = np.full_like(first, 255), ""  # the second row is of the same query
        report.append(entry)
    save_image(asked.output, table(rows))
    few = f"{min(count, len(searched))} nearest in {where.name} and in pixels"
    asked.finish(
        {"space": where.space, "in": where.name, "split": split, "searched": len(searched), "nearest": report},
        [f"of {searched}, {few} to each of {len(start.names)}: {asked.output}"],
        f"hflow-rt neighbours{asked.again} --in {next(iter(session.latent_shapes))} -o other.png",
    )


def _of_set(asked: Asked, session: "Session", names: list[str]) -> "dict[str, NDArray[np.float32]]":
    """Conditions of the images that are searched: of their folders, else of `--label`."""
    from hflow_rt.conditions import by_folder
    from hflow_rt.errors import DataError

    try:
        return by_folder(session.conditions, names)
    except DataError:
        return asked.conditions(session, names)


def _batches(chosen: "Selection") -> "Iterator[NDArray[np.float32]]":
    import numpy as np

    for start in range(0, len(chosen), _BATCH):
        yield chosen.pixels(range(len(chosen))[start : start + _BATCH]).astype(np.float32) / np.float32(255)
