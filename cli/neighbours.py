"""`hflow-rt neighbours`."""

from collections.abc import Iterator
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
    PlaceOption,
    SeedOption,
    StdOption,
    check_std,
    encoded,
    named,
    open_session,
    read_pictures,
    starting_points,
    told,
)
from hflow_rt.cli.terminal import note, print_json, say, say_next, tracked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.data.selection import Selection
    from hflow_rt.runtime.session import Session

_BATCH = 16


@app.command(rich_help_panel=LATENTS)
def neighbours(
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
    split: Annotated[str, typer.Option(help="test (the held-out images), train or all.")] = "all",
    count: Annotated[int, typer.Option("-k", "--count", help="Neighbours of each image.")] = 6,
    place: PlaceOption = None,
    samples: Annotated[int, typer.Option(help="Without images: how many samples.")] = 4,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp).")] = Path(
        "neighbours.png"
    ),
    seed: SeedOption = 0,
    std: StdOption = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Find the images whose encodings are nearest, and for comparison those whose pixels are.

    Example: hflow-rt neighbours photo.png --data photos/ -k 6 -o neighbours.png
    """
    import numpy as np

    from hflow_rt.conditions import class_folder
    from hflow_rt.data.selection import select
    from hflow_rt.runtime.encodings import Nearest, encodings, find_place
    from hflow_rt.runtime.pictures import (
        Row,
        check_picture_name,
        check_picture_size,
        from_uint8,
        save_image,
        table,
        table_size,
        to_uint8,
    )

    check_picture_name(output)
    check_std(std, not images)
    session = open_session(model, backend, device, quiet=json)
    if not images:
        check_picture_size(output, *table_size(count + 1, 2 * samples, session.resolution))
    where = find_place(session, place)
    searched = select(data, session.resolution, split, channels=session.channels)
    if searched.images.unused:
        note(f"not used of {searched.source}: {searched.images.left_out}")
    found, seen = [(class_folder(session.choices, data) if data else "") + name for name in searched.names], 0
    known = _of_set(session, found, label)
    if images:
        names, queries = read_pictures(images, session.resolution, choices=session.choices, channels=session.channels)
        conditions = told(session, names, label)
    else:
        names, drawn, latents = starting_points(session, None, samples, seed, std, label)
        # as they would be read from a file, so that samples and images are encoded alike
        queries, conditions = from_uint8(to_uint8(drawn)), {name: latents[name] for name in session.choices}
    nearest = {
        where.name: Nearest(encodings(session, encoded(session, queries, conditions), where), count),
        "pixels": Nearest(queries, count),
    }
    for pixels in tracked(_batches(searched), len(searched), len, "encoding"):
        part = {name: rows[seen : seen + len(pixels)] for name, rows in known.items()}
        nearest[where.name].add(encodings(session, session.inverse(pixels, part).latents, where))
        seen += len(pixels)
        nearest["pixels"].add(pixels)
    rows, report = [], []
    for index, name in enumerate(names):
        first, caption = to_uint8(queries[index : index + 1]), f"{Path(name).name}\nquery"
        entry: dict[str, object] = {"image": name}
        for space, result in nearest.items():
            hits = result.indices[index]
            pairs = [(found[hit], float(d)) for hit, d in zip(hits, result.distances[index], strict=True)]
            entry[space] = [{"image": hit, "distance": distance} for hit, distance in pairs]
            captions = [caption, *(f"{Path(hit).name}\n{distance:.3g}" for hit, distance in pairs)]
            rows.append(Row(np.concatenate([first, searched.pixels(hits).transpose(0, 2, 3, 1)]), space, captions))
            first, caption = np.full_like(first, 255), ""  # the second row is of the same query
        report.append(entry)
    save_image(output, table(rows))
    if json:
        looked = {"space": where.space, "in": where.name, "split": split, "searched": len(searched)}
        print_json({"output": str(output), **looked, "nearest": report})
        return
    few = f"{min(count, len(searched))} nearest in {where.name} and in pixels"
    say(f"of {searched}, {few} to each of {len(names)}: {output}")
    say_next(f"hflow-rt neighbours{named(model, '--model ')} --in {next(iter(session.latent_shapes))} -o other.png")


def _of_set(session: "Session", names: list[str], label: str | None) -> "dict[str, NDArray[np.float32]]":
    """What the model is told of the images that are searched: what their folders say, else `label`."""
    from hflow_rt.conditions import by_folder
    from hflow_rt.errors import DataError

    try:
        return by_folder(session.choices, names)
    except DataError:
        return told(session, names, label)


def _batches(chosen: "Selection") -> "Iterator[NDArray[np.float32]]":
    import numpy as np

    for start in range(0, len(chosen), _BATCH):
        yield chosen.pixels(range(len(chosen))[start : start + _BATCH]).astype(np.float32) / np.float32(255)
