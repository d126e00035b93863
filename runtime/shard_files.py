"""What a shard of a job holds: encodings as parquet or safetensors, samples as tar or npz, a batch at a time."""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hflow_rt.conditions import by_folder, class_folder, of_option
from hflow_rt.data.image_files import Skipped
from hflow_rt.data.image_source import ImageSource
from hflow_rt.data.resize import fit
from hflow_rt.errors import DataError, NoInverse
from hflow_rt.extras import needed
from hflow_rt.files import atomic_file
from hflow_rt.manifest import LOG_PROB, graphs_of
from hflow_rt.memory import need
from hflow_rt.runtime.images.pictures import to_picture, to_uint8
from hflow_rt.runtime.latents.files import about_model, latents_file
from hflow_rt.runtime.latents.round_trips import BATCH, RoundTrip, round_trip, together
from hflow_rt.runtime.session import Session

__all__ = ["check_classes", "encoding_settings", "join_arrays", "write_encoded", "write_sampled"]

Settings = Mapping[str, Any]
Told = Callable[[int], None]  # hears how many images of every batch

BITS = "bits_per_dim"
OFF = "largest_difference"  # of an image from what its latents decode to, in 8-bit levels
COARSE = 256  # numbers: latents that `score` keeps have at most so many together, 1 KiB an image
_GROUP = 1 << 23  # bytes of a row group of parquet, so that memory is the same for any shard
_KEY = "hflow_rt.latents"


def encoding_settings(
    session: Session, seed: int, keep: str | None, label: str | None, source: Path, files: str, scores: bool = False
) -> dict[str, Any]:
    """What decides an encoding beside the model, for a plan.

    keep: names of scores and latents, divided by commas; one without a number stands for all with one, and `all` for
    everything, which is also the default. scores: the default is them and the coarse latents, of `COARSE` numbers.
    label: the class of all images, else that of their folders in the source or around it. Raises `DataError`, and
    `NoInverse`.
    """
    if not session.can("inverse"):
        raise NoInverse(session.manifest.absent["inverse"])
    graphs = [session.manifest.graphs[name] for name in graphs_of(session.manifest.routes["inverse"])]
    known = [tensor.name for graph in graphs for tensor in graph.outputs if tensor.role == "score"]
    known = [*([BITS] if LOG_PROB in known else []), *known]
    kept = _kept(session, known, [OFF] if session.steps > 1 else [], keep, scores)
    if files == "safetensors" and not set(kept) & session.input_shapes.keys():
        raise DataError(f"safetensors holds latents, and --keep {keep} names none; name one, or write parquet")
    settings: dict[str, Any] = {"seed": seed, "keep": kept, "label": label}
    if label is not None:
        of_option(session.conditions, label, 1)
    elif folder := class_folder(session.conditions, source):
        settings["folder"] = folder
    return settings


def check_classes(session: Session, settings: Settings, source: ImageSource) -> None:
    """Raise `DataError` where the model needs the class of every image and no image tells one."""
    if not session.conditions or settings["label"] is not None:
        return
    first = (name for name, _ in source.part(range(1)))
    names = chain((name for name, _ in source.listing), first)
    if all(_classless(session, settings, name) for name in names):
        options = next(iter(session.conditions.values()))
        raise DataError(
            f"images need a folder named after a class ({', '.join(options[:8])}); make one, or say --label"
        )


def write_encoded(
    session: Session, settings: Settings, files: str, source: ImageSource, images: range, file: Any, told: Told
) -> tuple[int, int]:
    """Encode some images of a source into a file; how many, and how many could not be used.

    Parquet has a row an image: its name, scores, latents as fixed-size lists, and the reason why there are none, which
    are then null and NaN. Memory is that of a row group, for safetensors that of the latents of all.
    """
    encodings = _encodings(session, settings, source, images, told)
    if files == "parquet":
        return _write_table(session, settings, encodings, file)
    size = 12 * len(images) * sum(prod(session.input_shapes.get(name, ())) for name in settings["keep"])
    need(size, f"the latents of a shard of {len(images):,} images", "ask for more --shards, or --format parquet")
    return _write_latents(session, settings, len(images), encodings, file)


def write_sampled(
    session: Session, settings: Settings, files: str, images: range, file: Any, told: Told
) -> tuple[int, int]:
    """Draw some images of a seed into a file, and say how many, as `write_encoded` does."""
    (_pictures if files == "tar" else _array)(session, settings, images, file, told)
    return len(images), 0


def join_arrays(shards: Sequence[Path], target: Path) -> int:
    """Write the images of whole .npz shards, in this order, into one such file; how many they are.

    A shard at a time is in memory. Raises `DataError` where it cannot be written.
    """
    if target.suffix != ".npz":
        raise DataError(f"shards of .npz are joined into a .npz; found '{target.name}'; rename it")
    shapes = []
    for path in shards:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as array:
            np.lib.format.read_magic(array)
            shapes.append(np.lib.format.read_array_header_1_0(array)[0])
    count = sum(shape[0] for shape in shapes)
    with atomic_file(target) as temporary, open(temporary, "r+b") as file:
        _write_npz(file, (count, *shapes[0][1:]), (np.load(path)["arr_0"].tobytes() for path in shards))
    return count


class _Row(NamedTuple):
    """A picture of the job, uint8 `[C, R, R]`, or why there is none."""

    name: str
    pixels: NDArray[np.uint8] | None
    reason: str | None


class _Encodings(NamedTuple):
    """A batch: its rows, and scores `[n]` and latents `[n, *shape]` by name of the `n` whole ones among them."""

    rows: Sequence[_Row]
    values: Mapping[str, NDArray[np.float32]]

    @property
    def whole(self) -> list[int]:
        """The rows that have values."""
        return [index for index, row in enumerate(self.rows) if row.pixels is not None]


def _kept(session: Session, scores: Sequence[str], trips: Sequence[str], keep: str | None, few: bool) -> list[str]:
    """What is kept, in the order of the manifest. Raises `DataError`."""
    shapes = session.input_shapes
    known = [*scores, *trips, *shapes]
    if keep is None:
        coarse, numbers = [], 0
        for name in session.latent_shapes:
            numbers += prod(shapes[name])
            if numbers > COARSE:
                break
            coarse.append(name)
        kept = [*scores, *coarse] if few else known
    else:
        kept = []
        for part in keep.split(","):
            pattern = ".*" if part.strip() == "all" else re.escape(part.strip()) + r"\d*"
            found = [name for name in known if name == part.strip()] or [n for n in known if re.fullmatch(pattern, n)]
            if not found:
                raise DataError(
                    f"unknown '{part.strip()}' in --keep of this {session.manifest.family} model, which has all,"
                    f" {', '.join(known)}"
                )
            kept += found
    if not kept:
        raise DataError(f"this model tells no scores; say what to --keep: all, {', '.join(known)}")
    return [name for name in known if name in kept]


def _classless(session: Session, settings: Settings, name: str) -> str | None:
    """Why an image of this name has no class, where the model needs one."""
    try:
        _classes(session, settings, [name])
    except DataError as error:
        return str(error)
    return None


def _classes(session: Session, settings: Settings, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    if settings["label"] is not None:
        return of_option(session.conditions, settings["label"], len(names))
    return by_folder(session.conditions, [settings.get("folder", "") + name for name in names])


def _rows(session: Session, settings: Settings, source: ImageSource, images: range, size: int) -> Iterator[list[_Row]]:
    """The pictures of a shard, so many at a time."""
    batch: list[_Row] = []
    side, channels = session.resolution, session.channels
    for name, picture in source.part(images):
        found = picture if isinstance(picture, Skipped) else fit(picture, side, "center", channels)
        if isinstance(found, Skipped):
            batch.append(_Row(name, None, f"{found.reason}: {found.detail}"))
        else:
            reason = _classless(session, settings, name)
            batch.append(_Row(name, None if reason else found, reason))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encodings(
    session: Session, settings: Settings, source: ImageSource, images: range, told: Told
) -> Iterator[_Encodings]:
    first, size = images.start, together(session, BATCH)
    for rows in _rows(session, settings, source, images, size):
        part = _Encodings(rows, {})
        values: dict[str, NDArray[np.float32]] = {}
        if part.whole:
            # each image has its place and number, whatever becomes of its neighbours, in whose stead there is another;
            # latents of a loop hold in calls of as many images, so all of its calls are filled up
            whole = set(part.whole)
            places = range(size if session.steps > 1 else len(rows))
            taken = [rows[place] if place in whole else rows[part.whole[0]] for place in places]
            pixels = np.stack([row.pixels for row in taken if row.pixels is not None]).astype(np.float32)
            pixels /= np.float32(255)
            classes = _classes(session, settings, [row.name for row in taken]) if session.conditions else {}
            found = session.inverse(pixels, classes, first=first, seed=settings["seed"])
            values = {**found.latents, **found.scores}
            if BITS in settings["keep"]:
                values[BITS] = session.bits_per_dim(values[LOG_PROB])
            if OFF in settings["keep"]:
                trip = round_trip(session, pixels, found.latents)
                values[OFF] = np.array(trip.largest_difference, np.float32)
        kept = {name: values[name][part.whole] for name in settings["keep"] if part.whole}
        yield part._replace(values=kept)
        first += len(rows)
        told(len(rows))


def _about(session: Session, settings: Settings) -> dict[str, Any]:
    """What decoding latents depends on."""
    return about_model(session) | {name: settings[name] for name in ("controls", "steps") if name in settings}


def _write_table(session: Session, settings: Settings, encodings: Iterator[_Encodings], file: Any) -> tuple[int, int]:
    with needed("pyarrow", "writing parquet needs pyarrow; pip install 'hflow-rt[shards]'"):
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    shapes = {name: session.input_shapes[name] for name in settings["keep"] if name in session.input_shapes}
    types = {name: arrow.list_(arrow.float32(), prod(shape)) for name, shape in shapes.items()}
    fields = [(name, types.get(name, arrow.float32())) for name in settings["keep"]]
    about = {_KEY: json.dumps({"shapes": shapes, "metadata": _about(session, settings)})}
    schema = arrow.schema([("name", arrow.string()), *fields, ("reason", arrow.string())], about)
    count, refused, group = 0, 0, []
    with parquet.ParquetWriter(file, schema, use_dictionary=["reason"]) as writer:
        for part in encodings:
            columns: dict[str, Any] = {"name": [row.name for row in part.rows]}
            for name in settings["keep"]:
                # NaN instead of a null list, which readers of parquet before 2026 do not read
                values = np.full((len(part.rows), prod(shapes.get(name, ()))), np.nan, np.float32)
                if part.whole:
                    values[part.whole] = part.values[name].reshape(len(part.whole), -1)
                if name in shapes:
                    columns[name] = arrow.FixedSizeListArray.from_arrays(
                        arrow.array(values.reshape(-1)), values.shape[1]
                    )
                else:
                    missing = [row.pixels is None for row in part.rows]
                    columns[name] = arrow.array(values.reshape(-1), mask=np.array(missing))
            columns["reason"] = [row.reason for row in part.rows]
            group.append(arrow.table(columns, schema))
            count, refused = count + len(part.whole), refused + len(part.rows) - len(part.whole)
            if sum(table.nbytes for table in group) >= _GROUP:
                writer.write_table(arrow.concat_tables(group))
                group = []
        if group:
            writer.write_table(arrow.concat_tables(group))
    return count, refused


def _write_latents(
    session: Session, settings: Settings, count: int, encodings: Iterator[_Encodings], file: Any
) -> tuple[int, int]:
    shapes = {name: session.input_shapes[name] for name in settings["keep"] if name in session.input_shapes}
    values = {name: np.empty((count, *shapes.get(name, ())), np.float32) for name in settings["keep"]}
    names, skipped, refused = list[str](), dict[str, str | None](), 0
    for part in encodings:
        for name in settings["keep"] if part.whole else ():
            values[name][len(names) : len(names) + len(part.whole)] = part.values[name]
        names += [row.name for row in part.rows if row.pixels is not None]
        skipped |= {row.name: row.reason for row in part.rows if row.pixels is None}
        refused += len(part.rows) - len(part.whole)
    about = _about(session, settings) | {"images": names, "skipped": skipped}
    about |= {name: values[name][: len(names)].tolist() for name in values if name not in shapes and name != OFF}
    if OFF in values:
        off, batch = tuple(values[OFF][: len(names)].astype(int).tolist()), together(session, BATCH)
        about["round_trip"] = RoundTrip(backend=session.backend, batch=batch, largest_difference=off).model_dump(
            mode="json"
        )
    file.write(latents_file({name: values[name][: len(names)] for name in shapes}, about))
    return len(names), refused


def _pictures(session: Session, settings: Settings, images: range, file: Any, told: Told) -> None:
    """Samples as a tar of .png and .json by number, as webdataset reads it."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for first, pixels in _samples(session, settings, images, told):
            for index, image in enumerate(pixels, first):
                content = io.BytesIO()
                to_picture(image).save(content, "PNG")
                about = {"seed": settings["seed"], "image": index}
                for suffix, data in ((".png", content.getvalue()), (".json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{index:09d}{suffix}")  # without a time: the same bytes at any
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def _array(session: Session, settings: Settings, images: range, file: Any, told: Told) -> None:
    """Samples as one uint8 array `[n, R, R, C]`."""
    shape = (len(images), session.resolution, session.resolution, session.channels)
    _write_npz(file, shape, (pixels.tobytes() for _, pixels in _samples(session, settings, images, told)))


def _write_npz(file: Any, shape: tuple[int, ...], parts: Iterable[bytes]) -> None:
    """A uint8 array called `arr_0`, as tools that measure distances read it, piece by piece."""
    with (
        zipfile.ZipFile(file, "w") as archive,
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for part in parts:
            array.write(part)


def _samples(
    session: Session, settings: Settings, images: range, told: Told
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    first = images.start
    for latents in session.draw(images, settings["std"] or None, settings["seed"], BATCH, settings["label"]):
        pixels = to_uint8(session.forward(latents))
        yield first, pixels
        first += len(pixels)
        told(len(pixels))
