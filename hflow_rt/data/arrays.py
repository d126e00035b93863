"""Images that people keep as an array, uint8 in a `.npy` or `.npz` file, read one after the other."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from hflow_rt.data.image_files import short
from hflow_rt.data.image_source import ImageSource, Named
from hflow_rt.errors import DataError

__all__ = ["is_array", "open_array"]

_NAMES = ("images", "arr_0", "x")  # of the images in a .npz that holds several arrays


def is_array(path: Path) -> bool:
    """Whether `path` is called like a file of NumPy, and is no folder."""
    return path.suffix.lower() in (".npy", ".npz") and not os.path.isdir(path)


def open_array(path: Path) -> ImageSource:
    """The images of a `.npy`, or of a `.npz` with one array or one called `images`, `arr_0` or `x`.

    They are called `image#000000` and so on, their colours are taken as sRGB, and one at a time is in memory. Raises
    `DataError` for a file that is missing, damaged or ambiguous, and for an array that is not uint8 `[N, H, W, 3]`,
    `[N, 3, H, W]`, or grey: `[N, H, W]`, `[N, H, W, 1]` or `[N, 1, H, W]`.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path} is no regular file; give a .npy or .npz of images")
    try:
        with _stream(path) as (stream, size):
            layout = _layout(path, stream, size)
            start = stream.tell()
    except FileNotFoundError as error:
        raise DataError(f"no images at {path}: it does not exist; give a folder, zip, tar or array") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {short(error)}") from error
    except DataError:
        raise
    except Exception as error:  # a damaged zip raises nearly anything
        raise DataError(f"{path} is not a whole file of NumPy ({short(error)}); save it again") from error
    return ImageSource(partial(_images, path, layout, start), layout.number, [path.name], [size], only_images=True)


@contextmanager
def _stream(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The bytes of the array of images, and how many they are."""
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as stream:
            yield stream, path.stat().st_size
        return
    with zipfile.ZipFile(path) as archive:
        arrays = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
        found = list(arrays) if len(arrays) == 1 else [name for name in arrays if name.lower() in _NAMES]
        if len(found) != 1:
            held = f"the arrays {', '.join(map(repr, arrays))}" if arrays else "no array"
            raise DataError(
                f"{path} holds {held}, and one must be of images: save it alone, or only one of them as "
                f"{' or '.join(map(repr, _NAMES))}"
            )
        member = arrays[found[0]]
        with archive.open(member) as stream:
            yield stream, member.file_size


class _Layout(NamedTuple):
    """How an image lies in the array: `[C, H, W]` or, with colours last, `[H, W, C]`."""

    number: int
    height: int
    width: int
    colours: int
    last: bool


def _layout(path: Path, stream: IO[bytes], size: int) -> _Layout:
    """What the header says, once it is one of images and the bytes that follow are as many as it says."""
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    found = f"{path} holds {dtype} [{', '.join(map(str, shape))}]"
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise DataError(
            f"{found}; images must be uint8 from 0 to 255, as [N, H, W, 3] or [N, 3, H, W], or [N, H, W] if grey"
        )
    if min(shape) < 1:
        raise DataError(f"{found}, which is no image; give at least one")
    if by_columns:
        raise DataError(f"{found} in Fortran's order; save np.ascontiguousarray(array)")
    layout = _three(found, shape) if len(shape) == 3 else _four(found, shape)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and layout.height * layout.width > limit:
        raise DataError(f"{found}, images of more than {limit} pixels; reduce them first")
    data = size - stream.tell()
    if data != math.prod(shape):
        raise DataError(f"{found}, which needs {math.prod(shape)} bytes and not {data}; save it again")
    return layout


def _three(found: str, shape: tuple[int, ...]) -> _Layout:
    if shape[0] == 3 or shape[2] in (1, 3):
        raise DataError(
            f"{found}, which may be one image or grey ones; save array[None] if it is one image, "
            "array[..., None] if they are grey"
        )
    count, height, width = shape
    return _Layout(count, height, width, 1, True)


def _four(found: str, shape: tuple[int, ...]) -> _Layout:
    first, last = (shape[axis] in (1, 3) for axis in (1, 3))
    if first and last:
        raise DataError(f"{found}, where colours may come first or last; give images of more than 3 pixels a side")
    if not first and not last:
        raise DataError(f"{found}; images must have 3 colours, or 1, as [N, H, W, 3] or [N, 3, H, W]")
    count, height, width, colours = shape if last else (shape[0], shape[2], shape[3], shape[1])
    return _Layout(count, height, width, colours, last)


def _images(path: Path, layout: _Layout, start: int, numbers: range) -> Iterator[Named]:
    """Some of them; the array begins at the byte `start`."""
    _, height, width, colours, last = layout
    shape = (height, width, colours) if last else (colours, height, width)
    size = math.prod(shape)
    with _stream(path) as (stream, _):
        for index in numbers:
            try:
                if index == numbers.start:  # in a compressed one all before is read
                    stream.seek(start + index * size)
                pixels = np.frombuffer(stream.read(size), np.uint8).reshape(shape)
            except Exception as error:
                raise DataError(f"{path} is damaged at image {index} ({short(error)}); save it again") from error
            pixels = np.ascontiguousarray(pixels if last else pixels.transpose(1, 2, 0))
            yield f"image#{index:06}", Image.fromarray(pixels[..., 0] if colours == 1 else pixels).convert("RGB")
