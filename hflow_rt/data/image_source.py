"""What every source of images is to those who read it: named images in an order, from any of them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO

from PIL import Image

from hflow_rt.data.image_files import Skipped, read_image

__all__ = ["ImageSource", "Named", "of_files"]

Named = tuple[str, Image.Image | Skipped]


class ImageSource:
    """The images of a source in its order, each once: `(name, RGB image or Skipped)`; `len` says how many.

    read: yields those of a range. files, sizes: the names of the files that they are in and their bytes, -1 where
    nobody knows these before they are read. only_images: whether each is meant to be an image, whatever its name.
    """

    def __init__(
        self,
        read: Callable[[range], Iterator[Named]],
        count: int,
        files: Sequence[str],
        sizes: Sequence[int],
        only_images: bool = False,
    ) -> None:
        self._read, self._count, self._files, self._sizes = read, count, files, sizes
        self.only_images = only_images

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Named]:
        return self.part(range(self._count))

    def part(self, numbers: range) -> Iterator[Named]:
        """Those of the images alone, in their order; the bytes of others are not read where they can be skipped."""
        return self._read(numbers)

    @property
    def listing(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every file, by which a changed source is told."""
        return zip(self._files, self._sizes, strict=True)


def of_files(
    names: Sequence[str], sizes: Sequence[int], opened: Callable[[int], IO[bytes] | Skipped], only_images: bool = False
) -> ImageSource:
    """A file an image; `opened` yields the bytes of one by its number, or says why there are none."""

    def read(numbers: range) -> Iterator[Named]:
        return ((names[number], read_image(partial(opened, number))) for number in numbers)

    return ImageSource(read, len(names), names, sizes, only_images)
