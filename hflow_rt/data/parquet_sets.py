"""Parquet files with the bytes of an image a row, read a few rows at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from hflow_rt.data.file_names import clean
from hflow_rt.data.image_files import Skipped, read_bytes, short
from hflow_rt.data.image_source import ImageSource, Named
from hflow_rt.errors import DataError
from hflow_rt.extras import needed

__all__ = ["is_parquet", "open_parquet"]

# where a file has several columns of bytes, the first of these that it has
_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "data")
_ROWS = 16  # decoded together
_BUFFER = 1 << 20  # bytes read together of a column, whose part in a row group may be large, instead of all of it


def is_parquet(path: Path | str) -> bool:
    """Whether it is called like one."""
    return Path(path).suffix.lower() in (".parquet", ".pq")


def open_parquet(folder: Path, files: Sequence[str]) -> ImageSource:
    """The rows of files in a folder, called `file/000000` with, if the file knows it, the path of the image behind.

    Only the ends of the files are read before an image is asked for, and then the row groups it takes. The images are a
    column of bytes, or of structs of `bytes` and `path`. Raises `DataError`, and `BackendUnavailable` without pyarrow.
    """
    columns, counts, sizes = [], [], []
    for name in files:
        with _opened(folder / name) as file:
            columns.append(_column(folder / name, file.schema_arrow))
            counts.append(file.metadata.num_rows)
        sizes.append((folder / name).stat().st_size)
    ends = [*accumulate(counts)]

    def read(numbers: range) -> Iterator[Named]:
        index = bisect_right(ends, numbers.start)
        while index < len(files) and ends[index] - counts[index] < numbers.stop:
            first = ends[index] - counts[index]
            rows = range(max(numbers.start - first, 0), min(numbers.stop - first, counts[index]))
            yield from _rows(folder / files[index], clean(files[index]), columns[index], rows)
            index += 1

    return ImageSource(read, sum(counts), [clean(name) for name in files], sizes, only_images=True)


def _rows(path: Path, name: str, columns: Sequence[str], rows: range) -> Iterator[Named]:
    """The images in some rows of a file, of whose row groups no other is read. Raises `DataError` for a damaged one."""
    with _opened(path) as file:
        row = 0
        for group in range(file.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            if end <= rows.start or row >= rows.stop:
                row = end
                continue
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                if row >= rows.stop:
                    return
                values = batch.column(0)
                for place in range(max(rows.start - row, 0), min(rows.stop - row, len(values))):
                    yield _image(f"{name}/{row + place:06}", values[place].as_py())
                row += len(values)


def _image(name: str, value: Any) -> Named:
    """The image of a row: its bytes, or those and the path of the file that they were."""
    if isinstance(value, dict):
        if value.get("path"):
            name = f"{name}/{clean(value['path']).lstrip('/')}"
        value = value["bytes"]
    return name, Skipped("empty file", "its row holds no bytes") if value is None else read_bytes(value)


def _column(path: Path, schema: Any) -> list[str]:
    """What to read of the one column of images. Raises `DataError`."""
    types: Any = import_module("pyarrow.types")

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found: dict[str, list[str]] = {}
    for field in schema:
        if is_bytes(field.type):
            found[field.name] = [field.name]
        elif types.is_struct(field.type):
            inside = {field.type.field(place).name: field.type.field(place).type for place in range(len(field.type))}
            if "bytes" in inside and is_bytes(inside["bytes"]):
                found[field.name] = [f"{field.name}.{name}" for name in ("bytes", "path") if name in inside]
    known = [name for name in _NAMES if name in found]
    if len(found) == 1:
        return next(iter(found.values()))
    if known:
        return found[known[0]]
    held = ", ".join(f"{field.name} ({field.type})"[:60] for field in list(schema)[:8])
    raise DataError(f"{path} must have a column of image bytes, such as 'image'; it has {held}; rename it")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of `pyarrow.parquet`. Raises `DataError` for what goes wrong with it."""
    with needed("pyarrow", "reading parquet needs pyarrow: pip install 'hflow-rt[shards]'"):
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file ({short(error)}); copy or download it again") from error
