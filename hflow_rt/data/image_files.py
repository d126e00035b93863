"""The bytes of an image file, wherever it lies, to RGB pixels, or to the reason why they cannot be used.

What is wrong with the pixels of an image makes it unusable, what is wrong with its metadata does not.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from hflow_rt.data.colour import to_srgb

__all__ = [
    "MAX_FILE_BYTES",
    "Skipped",
    "looks_like_image",
    "open_file",
    "read_bytes",
    "read_file",
    "read_image",
    "short",
    "to_rgb",
]

# An uncompressed RGB image at Pillow's own pixel limit takes this much; anything larger is no photograph.
MAX_FILE_BYTES = 2**28
# Endings of images that Pillow does not read without help: people who have such files want to hear of them.
_FOREIGN = {".heic", ".heif", ".jxl", ".svg", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}
_PNG = b"\x89PNG\r\n\x1a\n"
# EXIF orientation: what turns the image upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SPECIAL = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFDIR: "folder",
}
# Without a handler Python prints what Pillow logs of damaged files on stderr; it comes as an exception as well.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Skipped:
    """Why an image is not used: a `reason` to count, a `detail` for people, the `size` of one too small."""

    reason: str
    detail: str
    size: tuple[int, int] | None = None


def read_file(path: Path | str) -> Image.Image | Skipped:
    """The image in a file, as RGB."""
    return read_image(partial(open_file, Path(path)))


def read_bytes(data: bytes) -> Image.Image | Skipped:
    """The image that the bytes of a file are, as RGB."""
    return read_image(partial(io.BytesIO, data))


def read_image(opener: Callable[[], IO[bytes] | Skipped]) -> Image.Image | Skipped:
    """The image in the bytes that `opener` yields, as RGB; it may say itself why there are none."""
    # Damaged data makes decompressors and Pillow's decoders raise nearly anything, hence the broad excepts.
    try:
        file = opener()
        if isinstance(file, Skipped):
            return file
        with file:
            data = file.read(MAX_FILE_BYTES + 1)
    except Exception as error:
        return Skipped("unreadable", f"it cannot be read ({short(error)})")
    if not data:
        return Skipped("empty file", "it is empty")
    if len(data) > MAX_FILE_BYTES:
        return Skipped("too large", f"it has more than {MAX_FILE_BYTES} bytes")
    found = _decode(data)
    if isinstance(found, Skipped) and found.reason != "too large" and data.startswith(_PNG):
        again = _decode(_bare_png(data))
        found = found if isinstance(again, Skipped) else again
    return found


def open_file(path: Path) -> IO[bytes] | Skipped:
    """A regular file. Opening a pipe would wait for ever, and some devices never end."""
    if os.path.isfile(path):
        return open(path, "rb")
    try:
        kind = _SPECIAL.get(stat.S_IFMT(path.stat().st_mode), "special file")
    except OSError:
        if not path.is_symlink():
            raise
        return Skipped("broken link", "it is a link that leads to no file")
    if path.is_symlink():
        kind = f"link to a {kind}"
    return Skipped(kind, f"it is a {kind}")


def looks_like_image(name: str) -> bool:
    """Whether a file is called like an image, readable or not."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in _FOREIGN or Image.registered_extensions().get(suffix) in Image.OPEN


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit sRGB, upright by its EXIF orientation, transparency composited on white.

    An embedded colour profile is converted, save that of 16-bit grey, which is scaled to 8 bits. Raises
    `ValueError` for pixels without a known range (float, 32-bit), and what a decoder raises for damaged ones.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("float pixels have no known range")
    if image.mode.startswith("I"):  # I;16*, or I, where Pillow keeps 16-bit PGM
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no known range")
        if isinstance(key := image.info.get("transparency"), int):
            values[values == key] = 65535
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    image = to_srgb(image)
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def short(error: Exception) -> str:
    """What an exception says, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__


def _orientation(image: Image.Image) -> int:
    """What EXIF says, as far as Pillow can read it; 1, upright, if it says nothing."""
    with suppress(Exception):  # a damaged block raises nearly anything
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if isinstance(value, int) else 1
    return 1


def _decode(data: bytes) -> Image.Image | Skipped:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image, _silent() if image.format == "TIFF" else nullcontext():
                return to_rgb(image)
    except UnidentifiedImageError:
        return Skipped("not an image", "it is not an image that Pillow can read")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return Skipped("too large", f"it has more than {Image.MAX_IMAGE_PIXELS} pixels")
    except MemoryError:
        return Skipped("too large", "memory does not hold its pixels")
    except Exception as error:
        return Skipped("broken image", f"it is a broken or unsupported image ({short(error)})")


@contextmanager
def _silent() -> Iterator[None]:
    """Send what C code prints on stderr nowhere: libtiff tells of damage there, and Pillow raises it as well."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _bare_png(data: bytes) -> bytes:
    """A PNG without the chunks that its pixels do not need: Pillow refuses files for a damaged or a long one."""
    kept, start = [data[:8]], 8
    while start < len(data):
        kind, end = data[start + 4 : start + 8], start + 12 + int.from_bytes(data[start : start + 4], "big")
        whole = zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if kind[:1].isupper() or kind == b"tRNS" or (kind in (b"eXIf", b"iCCP") and whole):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)
