"""Every source of images there is, opened alike: folders, archives, shards of either, arrays, datasets, LMDB sets.

Nothing is unpacked to disk, nothing in an archive is trusted: damaged or oversized entries are skipped with a
reason, a damaged archive is a `DataError`.
"""

from __future__ import annotations

import glob
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hflow_rt.data.archives import is_tar, open_tar, open_zip, tar_shards
from hflow_rt.data.arrays import is_array, open_array
from hflow_rt.data.file_names import clean, is_hidden, slashes
from hflow_rt.data.image_files import looks_like_image, open_file
from hflow_rt.data.image_source import ImageSource, of_files
from hflow_rt.data.lmdb_sets import lmdb_parts, lmdb_values
from hflow_rt.data.packed import is_packed, open_packed
from hflow_rt.data.parquet_sets import is_parquet, open_parquet
from hflow_rt.errors import DataError

__all__ = ["holds_many", "open_source"]


def holds_many(path: Path) -> bool:
    """Whether a path is, or is called like, a source of many images and no image itself."""
    named = path.suffix.lower() in (".zip", ".npy", ".npz", ".lmdb", ".mdb") or is_tar(path) or is_parquet(path)
    return named or os.path.isdir(path) or _is_pattern(path)


@contextmanager
def open_source(source: Path | str) -> Iterator[ImageSource]:
    """The images of a source, none of which is read yet.

    A folder (recursively, sorted), a zip (sorted), a tar (in its own order; any compression), an LMDB set, an array, a
    dataset, parquet files with image bytes, or a folder of parquet files or of tars, the shards of webdataset, without
    images beside them. A pattern such as `shards/*.tar` is all that it matches.
    Hidden files and macOS leftovers (`.name`, `__MACOSX/`) do not count as files; links to folders are not
    followed, but counted. A backslash in a name is a separator, as in archives made on Windows. Raises
    `DataError` if the source does not exist, cannot be read, is none of these, or is a damaged archive, and
    `BackendUnavailable` where a package that reads it is missing.
    """
    path = Path(source)
    if parts := lmdb_parts(path):
        with lmdb_values(parts) as values:
            names, sizes = [name for name, _, _ in values], [size for _, size, _ in values]
            yield of_files(names, sizes, lambda number: values[number][2]())
    elif os.path.isdir(path):
        yield _of_folder(path, _files(path))
    elif _is_pattern(path):
        yield _matching(path)
    elif is_packed(path):
        yield open_packed(path)
    elif is_array(path):
        yield open_array(path)
    elif is_parquet(path) and os.path.isfile(path):
        yield open_parquet(path.parent, [path.name])
    else:
        with open_zip(path) if _is_zip(path) else open_tar(path) as images:
            yield images


def _is_zip(path: Path) -> bool:
    """Whether it is a zip, or else may be a tar. Raises `DataError` where it is no file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path} is neither a folder nor a regular file; give a folder, zip or tar")
    try:
        with open(path, "rb") as file:
            # the end of a tar may look like a zip, so the first bytes decide
            return file.read(2) == b"PK" or path.suffix.lower() == ".zip"
    except FileNotFoundError as error:
        raise DataError(f"no images at {path}: it does not exist; give a folder, zip or tar") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path)) and not os.path.lexists(path)


def _matching(pattern: Path) -> ImageSource:
    """The files that a pattern is for, by their names below the last folder without one. Raises `DataError`."""
    parts = pattern.parts
    plain = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:plain])
    found = glob.glob(os.path.join(*parts[plain:]), root_dir=folder, recursive=True)
    names = sorted((name for name in found if os.path.isfile(folder / name) and not is_hidden(name)), key=slashes)
    if not names:
        raise DataError(f"no file is called like {pattern}; give a folder, or a pattern of files that are there")
    return _of_folder(folder, names)


def _of_folder(folder: Path, names: Sequence[str]) -> ImageSource:
    """Images of a folder, or else the shards in it: tars, beside which parquet files are about them, or those."""
    if not any(map(looks_like_image, names)):
        tars = [name for name in names if name.lower().endswith(".tar")]
        if tars:
            return tar_shards(folder, tars)
        if tables := [name for name in names if is_parquet(name)]:
            return open_parquet(folder, tables)
    sizes = array("q", (_size(folder / name) for name in names))
    # one string for both where they are the same, because there may be millions
    shown = [name if name == clean(name) else clean(name) for name in names]
    return of_files(shown, sizes, lambda number: open_file(folder / names[number]))


def _files(folder: Path) -> list[str]:
    """The files below a folder, sorted. Raises `DataError`."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    names = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        above = Path(parent).relative_to(folder).as_posix()
        names += [name if above == "." else f"{above}/{name}" for name in files + links]
    return sorted((name for name in names if not is_hidden(name)), key=slashes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
