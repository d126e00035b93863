"""Read every image of a folder, zip or tar, each as RGB or with the reason why it was skipped.

Nothing is unpacked to disk, nothing in an archive is trusted: damaged or oversized entries are skipped with a
reason, a damaged archive is a `DataError`.
"""

from __future__ import annotations

import io
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hflow_rt.errors import DataError

__all__ = ["Entry", "ImageSource", "Skipped", "open_source", "to_rgb"]

# An uncompressed RGB image at Pillow's own pixel limit takes this much; anything larger is no photograph.
MAX_FILE_BYTES = 2**28


@dataclass(frozen=True)
class Skipped:
    """Why an image is not used: a `reason` to count, a `detail` for people, the `size` of one too small."""

    reason: str
    detail: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Entry:
    """One file of a source; `open` yields its bytes, or None if it is not a regular file."""

    name: str
    open: Callable[[], IO[bytes] | None]


class ImageSource:
    """The files of a folder or archive in a fixed order; iterating yields `(name, RGB image or Skipped)`."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, Image.Image | Skipped]]:
        for entry in self.entries:
            yield entry.name, _read_image(entry)


@contextmanager
def open_source(source: Path | str) -> Iterator[ImageSource]:
    """List a folder (recursively, sorted), a zip (sorted) or a tar (in its own order; any compression).

    Hidden files and macOS leftovers (`.name`, `__MACOSX/`) do not count as files; links to folders are not
    followed. Raises `DataError` if the source does not exist, cannot be read, is none of the three, or is a
    damaged archive.
    """
    path = Path(source)
    if path.is_dir():
        yield ImageSource(_folder_entries(path))
        return
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is neither a folder nor a regular file; give a folder, zip or tar")
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"  # the end of a tar may look like a zip, so the first bytes decide
    except FileNotFoundError as error:
        raise DataError(f"no images at {path}: it does not exist; give a folder, zip or tar") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    opened = _open_zip(path) if is_zip or path.suffix.lower() == ".zip" else _open_tar(path)
    with opened as entries:
        yield ImageSource(entries)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, upright by its EXIF orientation, transparency composited on white.

    16-bit grey is scaled to 8 bits. Raises `ValueError` for pixels without a known range (float, 32-bit).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("float pixels have no known range")
    if image.mode.startswith("I"):  # I;16*, or I, where Pillow keeps 16-bit PGM
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no known range")
        if isinstance(key := image.info.get("transparency"), int):
            values[values == key] = 65535
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _read_image(entry: Entry) -> Image.Image | Skipped:
    # Damaged data makes decompressors and Pillow's decoders raise nearly anything, hence the broad excepts.
    try:
        file = entry.open()
        if file is None:
            return Skipped("unreadable", "it is not a regular file")
        with file:
            data = file.read(MAX_FILE_BYTES + 1)
    except Exception as error:
        return Skipped("unreadable", f"it cannot be read ({_short(error)})")
    if len(data) > MAX_FILE_BYTES:
        return Skipped("too large", f"it has more than {MAX_FILE_BYTES} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return to_rgb(image)
    except UnidentifiedImageError:
        return Skipped("not an image", "it is not an image that Pillow can read")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError):
        return Skipped("too large", f"it has more than {Image.MAX_IMAGE_PIXELS} pixels")
    except Exception as error:
        return Skipped("broken image", f"it is a broken or unsupported image ({_short(error)})")


def _folder_entries(folder: Path) -> list[Entry]:
    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    names = [
        Path(parent, file).relative_to(folder).as_posix()
        for parent, _, files in os.walk(folder, onerror=refuse)
        for file in files
    ]
    return [Entry(_clean(name), partial(_open_file, folder / name)) for name in sorted(names) if not _is_hidden(name)]


def _open_file(path: Path) -> IO[bytes] | None:
    return open(path, "rb") if path.is_file() else None  # opening a pipe would wait for ever


@contextmanager
def _open_zip(path: Path) -> Iterator[list[Entry]]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is not a whole zip file ({_short(error)}); copy or download it again") from error
    with archive:
        members = [member for member in archive.infolist() if not member.is_dir() and not _is_hidden(member.filename)]
        members.sort(key=lambda member: member.filename)
        yield [Entry(_clean(member.filename), partial(archive.open, member)) for member in members]


@contextmanager
def _open_tar(path: Path) -> Iterator[list[Entry]]:
    named_tar = ".tar" in path.suffixes or path.suffix in {".tgz", ".tbz2", ".txz"}
    try:
        archive = tarfile.open(path)  # noqa: SIM115 - closed by the with below
    except Exception as error:
        if named_tar:
            raise DataError(f"{path} is not a whole tar file ({_short(error)}); copy or download it again") from error
        raise DataError(f"{path} is neither a folder, a zip nor a tar; give one of these") from error
    with archive:
        try:
            members = archive.getmembers()
            # tarfile stops without a word where a header is cut; a whole archive goes on with an empty block
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end-of-archive mark")
        except Exception as error:
            raise DataError(
                f"{path} is a damaged or truncated tar ({_short(error)}); copy or download it again"
            ) from error
        members = [member for member in members if not member.isdir() and not _is_hidden(member.name)]
        yield [Entry(_clean(member.name), partial(archive.extractfile, member)) for member in members]


def _is_hidden(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _clean(name: str) -> str:
    """A name without leading `./` and with bytes that are not UTF-8 spelled out, so that JSON can hold it."""
    return name.removeprefix("./").encode(errors="surrogateescape").decode(errors="backslashreplace")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
