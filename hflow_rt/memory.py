"""Sizes are judged before memory is taken, and whatever runs out of memory says so in one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hflow_rt.errors import OutOfMemory

__all__ = ["available", "guarded", "is_out_of_memory", "need"]

# below this nothing is asked of the system; a machine that has less left has other worries
_SMALL = 2**26
# how torch on the CPU, CUDA, ONNX Runtime, TensorRT and C++ itself word it; their classes are private or too wide
_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "failed to allocate memory",
    "bad_alloc",
    "bfcarena",
    "outofmemory",
    "alloc_failed",
)


def available() -> int:
    """Bytes that this process can still take: of the machine, of its control group, and of its own limit."""
    import psutil

    found = [int(psutil.virtual_memory().available)]  # type: ignore[no-untyped-call]
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = int(kept["active_file"]) + int(kept["inactive_file"])  # which are dropped when memory is needed
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + files)
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - int(psutil.Process().memory_info().vms))  # type: ignore[no-untyped-call]
    return max(0, min(found))


def need(size: float, what: str, instead: str, room: int | None = None) -> None:
    """Raise `OutOfMemory` unless `size` bytes for `what` can be had: of `room`, by default of `available`.

    instead: what to lower.
    """
    if size <= _SMALL:
        return
    room = available() if room is None else room
    if size > room:
        raise OutOfMemory(f"{what} would take {_amount(size)} of memory, and {_amount(room)} are free; {instead}")


@contextmanager
def guarded(what: str, instead: str) -> Iterator[None]:
    """Raise `OutOfMemory`, which says to do `instead`, for whatever is raised inside because memory ran out."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {what}; {instead}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what `error` means, of Python, numpy, torch, ONNX Runtime or TensorRT."""
    if isinstance(error, MemoryError):
        return True
    # a name or a path may hold any words, so only what engines raise is read
    if not isinstance(error, RuntimeError) and not _of_engine(error):
        return False
    text = str(error).lower()
    return any(words in text for words in _WORDS)


def _of_engine(error: Any) -> bool:
    return type(error).__module__.partition(".")[0] in ("onnxruntime", "tensorrt", "tensorrt_rtx", "torch")


def _amount(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
