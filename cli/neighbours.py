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
    ModelOption,
    PlaceOption,
    SeedOption,
    StdOption,
    check_std,
    encoded,
    named,
    open_session,
    print_json,
    read_pictures,
    say_next,
    told,
    tracked,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.data.selection import Selection

_BATCH = 16


@app.command(rich_help_panel=LATENTS)
def neighbours(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Images to look for; without them samples.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Where to look: a folder, zip, tar or .npy; by default what ships.", show_default=False),
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
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Find the images whose encodings are nearest, and for comparison those whose pixels are.

    Example: hflow-rt neighbours photo.png --data photos/ -k 6 -o neighbours.png
    """
    import numpy as np

    from hflow_rt.data.selection import select
    from hflow_rt.runtime.encodings import Nearest, encodings, find_place
    from hflow_rt.runtime.pictures import Row, check_picture_name, from_uint8, save_image, table, to_uint8

    check_picture_name(output)
    check_std(std, not images)
    session = open_session(model, backend, device, quiet=json)
    where = find_place(session, place)
    searched = select(data, session.resolution, split)
    if images:
        names, queries = read_pictures(images, session.resolution)
    else:
        # as they would be read from a file, so that samples and images are encoded alike
        queries = from_uint8(to_uint8(session.sample(samples, std or session.std, seed)))
        names = [f"sample {index}" for index in range(samples)]
    nearest = {
        where.name: Nearest(encodings(session, encoded(session, queries, names), where), count),
        "pixels": Nearest(queries, count),
    }
    found, seen = searched.names, 0
    for pixels in tracked(_batches(searched), len(searched), len, "encoding"):
        conditions = told(session, found[seen : seen + len(pixels)])
        nearest[where.name].add(encodings(session, session.inverse(pixels, conditions).latents, where))
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
    print(f"of {searched}, {few} to each of {len(names)}: {output}")
    say_next(f"hflow-rt neighbours{named(model, '--model ')} --in {next(iter(session.latent_shapes))} -o other.png")


def _batches(chosen: "Selection") -> "Iterator[NDArray[np.float32]]":
    import numpy as np

    for start in range(0, len(chosen), _BATCH):
        yield chosen.pixels(range(len(chosen))[start : start + _BATCH]).astype(np.float32) / np.float32(255)
