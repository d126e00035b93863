"""`hflow-rt neighbours`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class _Place:
    """Where images are compared: pixels `[N, C, R, R]` in [0, 1] and their conditions to points `[N, D]`."""

    space: str
    name: str
    doing: str
    points: "Callable[[NDArray[np.float32], Mapping[str, NDArray[np.float32]]], NDArray[np.float32]]"


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
    features: Annotated[
        str | None,
        typer.Option(
            help="Compare features of a network instead of encodings, as 'eval distance' takes one: "
            "efficientnet-lite0, or a file.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Without images: how many samples.")] = 4,
) -> None:
    """Find the images whose encodings are nearest, and for comparison those whose pixels are.

    A model that has no inverse compares --features.

    Example: hflow-rt neighbours photo.png --data photos/ -k 6 -o neighbours.png
    """
    import numpy as np

    from hflow_rt.conditions import class_folder
    from hflow_rt.data.selection import select
    from hflow_rt.errors import DataError, NoInverse
    from hflow_rt.runtime.images.pictures import Row, from_uint8, save_image, table, to_uint8
    from hflow_rt.runtime.latents.nearest import Nearest

    asked.check_std(not images)
    if features is not None and tensor is not None:
        raise DataError("--features and --in each say what is compared; keep one of them")
    session = asked.open_for_picture()
    if features is None and not session.can("inverse"):
        raise NoInverse(
            f"{session.manifest.absent['inverse']}; --features efficientnet-lite0 compares images as they are"
        )
    if not images:
        asked.check_table(session, count + 1, 2 * samples)
    place = _encodings(session, tensor, asked.seed) if features is None else _features(session, features)
    searched = select(data, session.resolution, split, channels=session.channels)
    if searched.images.unused:
        note(f"not used of {searched.source}: {searched.images.left_out}")
    found, seen = [(class_folder(session.conditions, data) if data else "") + name for name in searched.names], 0
    known = _of_set(asked, session, found) if features is None else {}
    if images:
        names, queries = asked.read(session, images)
        told = asked.conditions(session, names) if features is None else {}
    else:
        drawn = replace(asked, number=samples).start(session, None)
        # as they would be read from a file, so that samples and images are encoded alike
        names, queries = drawn.names, from_uint8(to_uint8(drawn.pixels))
        told = {name: drawn.latents[name] for name in session.conditions}
    nearest = {place.name: Nearest(place.points(queries, told), count), "pixels": Nearest(queries, count)}
    for pixels in tracked(_batches(searched), len(searched), len, place.doing):
        part = {name: rows[seen : seen + len(pixels)] for name, rows in known.items()}
        nearest[place.name].add(place.points(pixels, part))
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
    save_image(asked.output, table(rows))
    few = f"{min(count, len(searched))} nearest in {place.name} and in pixels"
    other = f"--in {next(iter(session.latent_shapes))}" if features is None else f"--features {features} -k {count + 1}"
    asked.finish(
        {"space": place.space, "in": place.name, "split": split, "searched": len(searched), "nearest": report},
        [f"of {searched}, {few} to each of {len(names)}: {asked.output}"],
        f"hflow-rt neighbours{asked.again} {other} -o other.png",
    )


def _encodings(session: "Session", tensor: str | None, seed: int) -> _Place:
    from hflow_rt.runtime.latents.nearest import find_tensor, points
    from hflow_rt.runtime.latents.round_trips import encoded

    where = find_tensor(session, tensor)

    def find(pixels: "NDArray[np.float32]", known: "Mapping[str, NDArray[np.float32]]") -> "NDArray[np.float32]":
        return points(session, encoded(session, pixels, known, seed=seed, only=where.only).latents, where)

    return _Place(where.space, where.name, "encoding", find)


def _features(session: "Session", features: str) -> _Place:
    from hflow_rt.data.pixels import to_levels
    from hflow_rt.evaluation.features import open_features
    from hflow_rt.extras import need_extra

    need_extra("eval", "torch")
    network = open_features(features, session.resolution)
    return _Place("features", network.name, "looking", lambda pixels, _: network(to_levels(pixels)))


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
