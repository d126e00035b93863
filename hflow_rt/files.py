"""Write files so that nobody ever sees half of one: a temporary name beside the target, then a rename."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from hflow_rt.errors import DataError

__all__ = [
    "atomic_directory",
    "atomic_file",
    "destination",
    "exists",
    "is_file",
    "is_folder",
    "is_ours",
    "locked",
    "removed_if_empty",
    "sha256",
    "unusable",
]

_UMASK = Lock()
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # of some network file systems
_MARKS, _ENDS = (b"hflow-rt", b"hflow_rt"), 1 << 16
_KINDS = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
_ADVICE = {
    errno.EACCES: "choose a place where you may write",
    errno.EPERM: "choose a place where you may write",
    errno.EROFS: "choose a place where you may write",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a folder on the way is a file; choose another place",
    errno.EISDIR: "name a file",
    errno.ENOSPC: "free space or choose another place",
    errno.EDQUOT: "free space or choose another place",
    errno.EFBIG: "free space or choose another place",
}


@contextmanager
def atomic_file(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it replaces `target`, on any failure it is removed.

    A link stays, and what is behind it is written. Raises `DataError` where `destination` does, where the folder
    cannot be written and where the disk is full.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        place = destination(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{place.stem[:40]}.", suffix=place.suffix, dir=place.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, place)
    except OSError as error:
        raise unusable(target, error, "write") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path | str, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success it takes the place of `target`, else it is removed.

    replace: else what has come to be at `target` meanwhile, but for an empty folder, is an error and stays.
    A link stays, and the folder behind it is replaced. Raises `DataError` where `target` is there and no folder, where
    the place cannot be written and where the disk is full; `target` is then as it was.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        place = destination(target)
        if exists(place) and not is_folder(place):
            raise DataError(f"cannot write {target}: it is a file and must be a folder; choose another name")
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}.", dir=place.parent))
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if replace and exists(place):
            old = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}.old.", dir=place.parent))
            try:
                os.replace(place, old / place.name)
                os.replace(temporary, place)
            except BaseException:
                if not exists(place):
                    os.replace(old / place.name, place)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, place)
    except OSError as error:
        raise unusable(target, error, "write") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove `folder` again if nothing is in it after what is done inside, however that ends."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Whether nobody else holds the file `path`, which is held inside and goes at the end, also that of the process.

    None where there are no locks, so that nobody can know. Raises `DataError` where it cannot be made.
    """
    try:
        held = _lock(path)
    except OSError as error:
        raise unusable(path, error, "write") from error
    if held is None:
        yield False
        return
    handle, known = held
    try:
        yield True if known else None
    finally:
        with contextlib.suppress(OSError):  # Windows keeps what is open
            path.unlink()  # before it is let go, so that nobody holds a file without a name
        os.close(handle)


def _lock(path: Path) -> tuple[int, bool] | None:
    """A handle that holds the lock at `path` until it is closed, also by the end of the process; None if it is held.

    And whether there are locks at all.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                return handle, True
            os.close(handle)  # the process that held it has just removed it
        except ImportError:  # Windows
            return handle, False
        except OSError as error:
            if error.errno in _NO_LOCKS:  # there, too, two are told apart by nothing
                return handle, False
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise


def _is_at(handle: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def destination(target: Path | str) -> Path:
    """Where writing to `target` really goes: behind links, at a regular file, a folder or a name that is free.

    Raises `DataError` for `-`, a device, a pipe and a socket, which a rename would replace by a file.
    """
    target = Path(target)
    if str(target) == "-":
        raise DataError("cannot write to standard output; name a file")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(target))
    except OSError as error:
        raise unusable(target, error, "write") from error
    for matches, kind in _KINDS:
        if matches(mode):
            raise DataError(f"cannot write {target}: it is {kind}, which a file would replace; name a file")
    place = Path(os.path.realpath(target))
    with contextlib.suppress(OSError):
        if place.samefile(target):
            return place
    raise DataError(f"cannot write {target}: the file behind it has no name any more; name a file")


def is_file(path: Path | str) -> bool:
    """Whether a regular file is there. Raises `DataError` where that cannot be asked (no permission, a long name)."""
    return (mode := _mode(path)) is not None and stat.S_ISREG(mode)


def is_folder(path: Path | str) -> bool:
    """Whether a folder is there; raises as `is_file` does."""
    return (mode := _mode(path)) is not None and stat.S_ISDIR(mode)


def exists(path: Path | str) -> bool:
    """Whether anything is there; raises as `is_file` does."""
    return _mode(path) is not None


def is_ours(path: Path | str) -> bool:
    """Whether hflow-rt wrote the file: each kind that it writes holds its name near an end. Raises `DataError`."""
    try:
        with open(path, "rb") as file:
            start = file.read(_ENDS)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _ENDS))
            return any(mark in part for part in (start, file.read(_ENDS)) for mark in _MARKS)
    except OSError as error:
        raise unusable(path, error) from error


def unusable(path: Path | str, error: OSError, what: str = "read") -> DataError:
    """The one line for `error` on `path`: what could not be done, why, and what helps against that."""
    advice = _ADVICE.get(error.errno or 0, "choose another place")
    if what == "read":
        advice = "check the name and its permissions"
    return DataError(f"cannot {what} {path}: {error.strerror or error}; {advice}")


def sha256(path: Path | str) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mode(path: Path | str) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # a null byte
        raise DataError(f"cannot read {path}: {error}; check the name") from error
    except OSError as error:
        if error.errno == errno.ELOOP:  # links in a circle lead nowhere
            return None
        raise unusable(path, error) from error


def _umask() -> int:
    """It can only be read by setting it, and belongs to all threads."""
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask
