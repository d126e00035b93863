"""A dataset as it lies on disk: `NAME.npy`, a plain array that is mapped into memory, and `NAME.json` about it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from hflow_rt.data.arrays import is_array
from hflow_rt.data.image_source import ImageSource, Named
from hflow_rt.data.resize import Crop
from hflow_rt.errors import DataError
from hflow_rt.files import sha256

__all__ = ["HEADER_BYTES", "DatasetInfo", "array_header", "is_packed", "map_array", "open_packed", "read_info"]

# One header size for every image count, so that it can be written before the images are counted.
HEADER_BYTES = 128


class DatasetInfo(BaseModel):
    """What `NAME.json` holds.

    `sha256` is of the `.npy` file's bytes, `skipped` counts files by reason, and `unused` says of each file that is or
    looks like an image why it is not used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    source: str
    count: int
    resolution: int
    channels: Literal[1, 3] = 3
    crop: Crop
    sha256: str
    skipped: dict[str, int]
    unused: dict[str, str] = {}
    names: list[str]


def is_packed(path: Path) -> bool:
    """Whether a `.npy` has a description beside it, right or wrong; without one it is any array."""
    return path.suffix.lower() == ".npy" and is_array(path) and os.path.lexists(path.with_suffix(".json"))


def read_info(path: Path) -> DatasetInfo:
    """The description of a dataset. Raises `DataError`."""
    info_path = path.with_suffix(".json")
    if not os.path.isfile(info_path):  # reading a pipe would wait for ever
        raise DataError(f"{info_path} must be a regular file that describes a dataset; move it, or repair the link")
    try:
        return DatasetInfo.model_validate_json(info_path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise DataError(
            f"{info_path} does not describe a dataset ({where}: {first['msg']}); build it again with "
            f"'hflow-rt dataset', or, if {path.name} is an array of your own, keep the two apart"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {info_path}: {error.strerror or error}") from error


def map_array(path: Path, info: DatasetInfo) -> NDArray[np.uint8]:
    """The images `[N, C, R, R]` of a dataset, mapped into memory once they are what `info` says. Raises `DataError`."""
    described, again = path.with_suffix(".json").name, "build it again with 'hflow-rt dataset'"
    shape = (info.count, info.channels, info.resolution, info.resolution)
    expected = HEADER_BYTES + int(np.prod(shape, dtype=np.int64))
    try:
        size, digest = path.stat().st_size, sha256(path)
        if size != expected:
            raise DataError(f"{path} has {size} bytes where {described} asks for {expected}; {again}")
        if digest != info.sha256:
            raise DataError(f"{path} is not the file that {described} describes (sha256 differs); {again}")
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise DataError(f"a dataset is a .npy and a .json side by side, and {path} is missing; {again}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; {again}") from error
    if array.shape != shape or array.dtype != np.uint8 or len(info.names) != info.count or info.count < 1:
        raise DataError(
            f"{path} holds {array.dtype} {list(array.shape)} where {described} asks for "
            f"uint8 {list(shape)} with {len(info.names)} names; {again}"
        )
    return np.asarray(array)


def open_packed(path: Path) -> ImageSource:
    """Its images, which keep their names, so that they are split as before. Raises `DataError`."""
    info = read_info(path)
    array = map_array(path, info)

    def read(numbers: range) -> Iterator[Named]:
        for number in numbers:
            pixels = np.broadcast_to(array[number], (3, info.resolution, info.resolution))
            yield info.names[number], Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    return ImageSource(read, info.count, [path.name, info.sha256], [path.stat().st_size] * 2, only_images=True)


def array_header(shape: tuple[int, ...]) -> bytes:
    """The first bytes of the `.npy` (format 1.0), padded to `HEADER_BYTES`."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    room = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + text.ljust(room - 1).encode() + b"\n"
