"""Images of people as a model takes them, wherever they lie: files, folders, archives and arrays."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hflow_rt.conditions import Options, class_folder
from hflow_rt.data.dataset import open_dataset
from hflow_rt.data.sources import holds_many
from hflow_rt.errors import DataError
from hflow_rt.memory import need
from hflow_rt.names import shown
from hflow_rt.runtime.images.pictures import read_image

__all__ = ["not_as_they_are", "read_pictures"]


def not_as_they_are(paths: Sequence[Path]) -> Iterator[str]:
    """A line for each image file that `read_pictures` does not take as it is, but for its size: what becomes of it."""
    for path in paths:
        if holds_many(path):
            continue
        with Image.open(path) as image:
            if image.has_transparency_data:
                yield f"{path} has an alpha channel; what is transparent is taken as white"
            if image.width != image.height:
                yield f"{path} is {image.width}x{image.height}; the largest square in the middle is taken"


def read_pictures(
    paths: Sequence[Path],
    resolution: int,
    limit: int | None = None,
    conditions: Options | None = None,
    unused: dict[str, str] | None = None,
    note: Callable[[str], None] = lambda line: None,
    channels: int = 3,
) -> tuple[list[str], NDArray[np.float32]]:
    """Names and pixels `[N, C, R, R]` in [0, 1] of image files, folders, archives and arrays, the first `limit`.

    conditions: of the model; a file's or folder's name then tells its class, see `class_folder`.
    unused: takes the names of images in folders and archives that cannot be used, and why; if there are several
    sources, with the source before the name. note: takes a line with their number. channels: C; with 1 what is read
    is the luminance. Raises `DataError`.
    """
    names: list[str] = []
    images: list[NDArray[np.float32]] = []
    for path in paths:
        folder = class_folder(conditions or {}, path)
        if holds_many(path):
            found = open_dataset(path, resolution, channels=channels)
            if found.unused:
                note(f"{len(found)} images in {path}; not used: {found.left_out}")
            if unused is not None:
                above = f"{path}/" if len(paths) > 1 else folder
                unused |= {above + name: reason for name, reason in found.unused.items()}
            count = len(found) if limit is None else min(limit, len(found))
            need(12 * channels * count * resolution**2, f"{count:,} images", "take fewer together")  # thrice as float32
            names += [folder + name for name in found.names[:limit]]
            images += list(found.pixels(range(len(found))[:limit]).astype(np.float32) / 255)
        else:
            names.append(folder + shown(path.name))
            images.append(read_image(path, resolution, channels=channels))
    if not images:
        raise DataError("no images given; name at least one file, folder or archive")
    return names[:limit], np.stack(images[:limit])
