"""The bytes of a file nobody vouches for: every length is held against what is really left before it is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import CheckpointError

__all__ = ["Source", "open_source", "shown"]

_LINE = 1000  # longest line of text that a pickle may hold: the names of a module and a class
_SHOWN = 80


class Source:
    """A file read forwards. `name` stands in every message. Every method raises `CheckpointError`."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self.position = 0
        self._file = file
        self._end = file.seek(0, 2)
        file.seek(0)

    @property
    def left(self) -> int:
        """Bytes between here and the end."""
        return self._end - self.position

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._need(count)
        data = self._file.read(count)
        return data if len(data) == count else self._changed()

    def readline(self) -> bytes:
        """The next line with its newline."""
        line = self._file.readline(min(self.left, _LINE))
        self.position += len(line)
        if not line.endswith(b"\n"):
            raise self.broken("a line of text has no end" if len(line) == _LINE else "it ends too early")
        if b"\\" in line:
            raise self.broken("a name holds a backslash")
        return line

    def peek(self, count: int) -> bytes:
        """Up to `count` next bytes, which stay unread."""
        data = self._file.read(count)
        self._file.seek(self.position)
        return data

    def array(self, count: int) -> NDArray[np.uint8]:
        """The next `count` bytes as an array of one's own."""
        self._need(count)
        data = np.empty(count, np.uint8)
        if self._file.readinto(data.data) != count:  # type: ignore[attr-defined]
            self._changed()
        return data

    def skip(self, count: int) -> None:
        """Leave the next `count` bytes out."""
        self._need(count)
        self._file.seek(self.position)

    def length(self, size: int = 4) -> int:
        """The next little-endian unsigned integer of `size` bytes."""
        return int.from_bytes(self.read(size), "little")

    @contextmanager
    def limited(self, count: int) -> Iterator[None]:
        """Let no more than the next `count` bytes be read inside."""
        end, self._end = self._end, min(self._end, self.position + count)
        try:
            yield
        finally:
            self._end = end

    def broken(self, reason: str) -> CheckpointError:
        """The file does not keep its own format, as one that was cut or changed on its way does not."""
        return CheckpointError(
            f"{self.name} is not a whole model file ({reason}, at byte {self.position:,}); copy or download it again"
        )

    def refused(self, what: str) -> CheckpointError:
        """The file wants something that has no place in it."""
        return CheckpointError(f"{self.name} asks for {what}, which a model file never needs; refused")

    def _need(self, count: int) -> None:
        if not 0 <= count <= self.left:
            raise self.broken(f"it says that {count:,} bytes follow, where {self.left:,} are left or allowed")
        self.position += count

    def _changed(self) -> bytes:
        raise self.broken("it was cut while it was read")


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a file for reading. Raises `CheckpointError`."""
    try:
        if not S_ISREG(path.stat().st_mode):  # before it is opened: a pipe may never be written to
            raise CheckpointError(f"no file at {path}; name a published checkpoint")
        with open(path, "rb") as file:
            yield Source(file, str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"no file at {path}; name a published checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def shown(text: str, limit: int = _SHOWN) -> str:
    """`text` from a file, fit to stand in a one-line message: printable ASCII, of no more than `limit` characters."""
    plain = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= limit else plain[:limit] + "..."
