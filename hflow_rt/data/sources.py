"""Read every image of a folder, zip or tar, each as RGB or with the reason why it was skipped.

Nothing is unpacked to disk, nothing in an archive is trusted: damaged or oversized entries are skipped with a
reason, a damaged archive is a `DataError`. One function reads the bytes of an image, wherever it lies: what is
wrong with its pixels makes it unusable, what is wrong with its metadata does not.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from hflow_rt.data.colour import to_srgb
from hflow_rt.data.lmdb_sets import lmdb_parts, lmdb_values
from hflow_rt.errors import DataError

__all__ = ["ImageSource", "Skipped", "looks_like_image", "open_source", "read_bytes", "read_file", "short", "to_rgb"]

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


class ImageSource:
    """The images of a source in its order, each once: `(name, RGB image or Skipped)`; `len` says how many."""

    def __init__(
        self, images: Iterable[tuple[str, Image.Image | Skipped]], count: int, entries: Sequence[_Entry] = ()
    ) -> None:
        self._images, self._count, self._entries = images, count, entries

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, Image.Image | Skipped]]:
        return iter(self._images)

    def part(self, numbers: range) -> Iterator[tuple[str, Image.Image | Skipped]]:
        """Those of the images alone, in their order; of files the others are not read."""
        if self._entries:
            found = self._entries[numbers.start : numbers.stop]
            return ((entry.name, _read_image(entry.open)) for entry in found)
        return islice(self._images, numbers.start, numbers.stop)

    @property
    def listing(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every file, -1 where nobody knows before it is read; of an array one for all."""
        if self._entries:
            return ((entry.name, entry.size) for entry in self._entries)
        return iter([("images", self._count)])


@dataclass(frozen=True)
class _Entry:
    """One file of a source; `open` yields its bytes, or says why there are none."""

    name: str
    open: Callable[[], IO[bytes] | Skipped]
    size: int = -1


@contextmanager
def open_source(source: Path | str) -> Iterator[ImageSource]:
    """List a folder (recursively, sorted), a zip (sorted), a tar (in its own order; any compression) or an LMDB set.

    Hidden files and macOS leftovers (`.name`, `__MACOSX/`) do not count as files; links to folders are not
    followed, but counted. A backslash in a name is a separator, as in archives made on Windows. Raises
    `DataError` if the source does not exist, cannot be read, is none of these, or is a damaged archive.
    """
    path = Path(source)
    if parts := lmdb_parts(path):
        with lmdb_values(parts) as values:
            yield _source([_Entry(name, opener) for name, opener in values])
        return
    if os.path.isdir(path):
        yield _source(_folder_entries(path))
        return
    if os.path.exists(path) and not os.path.isfile(path):
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
        yield _source(entries)


def read_file(path: Path | str) -> Image.Image | Skipped:
    """The image in a file, as RGB."""
    return _read_image(partial(_open_file, Path(path)))


def read_bytes(data: bytes) -> Image.Image | Skipped:
    """The image that the bytes of a file are, as RGB."""
    return _read_image(partial(io.BytesIO, data))


def looks_like_image(name: str) -> bool:
    """Whether a file is called like an image, readable or not."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in _FOREIGN or suffix in Image.registered_extensions()


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


def _orientation(image: Image.Image) -> int:
    """What EXIF says, as far as Pillow can read it; 1, upright, if it says nothing."""
    with suppress(Exception):  # a damaged block raises nearly anything
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if isinstance(value, int) else 1
    return 1


def _source(entries: list[_Entry]) -> ImageSource:
    return ImageSource(((entry.name, _read_image(entry.open)) for entry in entries), len(entries), entries)


def _read_image(opener: Callable[[], IO[bytes] | Skipped]) -> Image.Image | Skipped:
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


def _folder_entries(folder: Path) -> list[_Entry]:
    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    names = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files + links]
    names = sorted((name for name in names if not _is_hidden(name)), key=_slashes)
    return [_Entry(_clean(name), partial(_open_file, folder / name), _size(folder / name)) for name in names]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _open_file(path: Path) -> IO[bytes] | Skipped:
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


@contextmanager
def _open_zip(path: Path) -> Iterator[list[_Entry]]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is not a whole zip file ({short(error)}); copy or download it again") from error
    with archive:
        members = [(_slashes(member.filename), member) for member in archive.infolist()]
        files = [(name, member) for name, member in members if not name.endswith("/") and not _is_hidden(name)]
        files.sort(key=lambda file: file[0])
        yield [_Entry(_clean(name), partial(archive.open, member), member.file_size) for name, member in files]


@contextmanager
def _open_tar(path: Path) -> Iterator[list[_Entry]]:
    named_tar = ".tar" in path.suffixes or path.suffix in {".tgz", ".tbz2", ".txz"}
    try:
        archive = tarfile.open(path)  # noqa: SIM115 - closed by the with below
    except Exception as error:
        if named_tar:
            raise DataError(f"{path} is not a whole tar file ({short(error)}); copy or download it again") from error
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
                f"{path} is a damaged or truncated tar ({short(error)}); copy or download it again"
            ) from error
        members = [member for member in members if not member.isdir() and not _is_hidden(member.name)]
        yield [_Entry(_clean(one.name), partial(_open_member, archive, one), one.size) for one in members]


def _open_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes] | Skipped:
    return archive.extractfile(member) or Skipped("unreadable", "it is not a regular file")


def _is_hidden(name: str) -> bool:
    parts = [part for part in _slashes(name).split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _clean(name: str) -> str:
    """A name without leading `./` and with bytes that are not UTF-8 spelled out, so that JSON can hold it."""
    return _slashes(name).removeprefix("./").encode(errors="surrogateescape").decode(errors="backslashreplace")


def short(error: Exception) -> str:
    """What an exception says, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__
