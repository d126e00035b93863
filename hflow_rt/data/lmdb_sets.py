"""LMDB sets of images: keys in decimal text, values raw RGB of square images or encoded ones."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from hflow_rt.errors import DataError
from hflow_rt.extras import needed

__all__ = ["Value", "lmdb_parts", "lmdb_values"]

_FILE = "data.mdb"  # of a set that is a folder
_SUFFIXES = (".lmdb", ".mdb")
_ENCODED = (b"\xff\xd8\xff", b"\x89PNG")  # how files begin whose length might be that of raw pixels

# name, bytes, and what opens it
Value = tuple[str, int, partial[IO[bytes]]]


def lmdb_parts(path: Path) -> dict[str, Path]:
    """Sets by the folder that names of their images begin with; none where `path` is something else.

    A path is one set, or a folder of several, such as `train.lmdb` and `validation.lmdb`.
    """
    if path.suffix.lower() in _SUFFIXES and path.is_file():
        return {"": path}
    if (path / _FILE).is_file():
        return {"": path}
    if not path.is_dir():
        return {}
    found = sorted(child for child in path.iterdir() if child.suffix.lower() in _SUFFIXES)
    return {f"{child.stem}/": child for child in found}


@contextmanager
def lmdb_values(parts: dict[str, Path]) -> Iterator[list[Value]]:
    """Every value of all sets, by number. Raises `DataError`, and `BackendUnavailable` without the package."""
    with needed("lmdb", "reading LMDB needs lmdb: pip install 'hflow-rt[train]'"):
        import lmdb
    with ExitStack() as stack:
        values: list[Value] = []
        for folder, path in parts.items():
            try:
                opened = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
                environment = stack.enter_context(opened)
                transaction = stack.enter_context(environment.begin())
                with environment.begin(buffers=True) as listed:  # whose values are not read
                    found = ((bytes(key), len(value)) for key, value in listed.cursor())
                    keys = sorted((_number(key, path), key, size) for key, size in found)
            except lmdb.Error as error:
                raise DataError(f"{path} is not a whole LMDB ({str(error).splitlines()[0]}); copy it again") from error
            if not keys:
                raise DataError(f"{path} has no keys; it must hold images under the keys 0, 1, ...")
            _check_counted([number for number, _, _ in keys], path)
            # .ppm is what raw values are read as, and says that all are images
            values += [(f"{folder}{number}.ppm", size, partial(_open, transaction, key)) for number, key, size in keys]
        yield values


def _number(key: bytes, path: Path) -> int:
    if not key.isdigit():
        raise DataError(f"keys of {path} must be decimal numbers, as in sets of images; found {key[:40]!r}")
    return int(key)


def _check_counted(numbers: list[int], path: Path) -> None:
    """Raise `DataError` unless they are 0, 1, ..., each once: what lacks one was not copied whole."""
    for expected, number in enumerate(numbers):
        if number != expected:
            wrong = f"lacks the key {expected}" if number > expected else f"has the key {number} twice"
            raise DataError(f"{path} {wrong}; it must hold images under the keys 0 to {numbers[-1]}, so copy it again")


def _open(transaction: Any, key: bytes) -> IO[bytes]:
    value: bytes = transaction.get(key)
    side = math.isqrt(len(value) // 3)
    if side and 3 * side * side == len(value) and not value.startswith(_ENCODED):
        value = b"P6 %d %d 255\n" % (side, side) + value
    return io.BytesIO(value)
