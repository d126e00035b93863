"""Batches of images, and who works on them: this process alone, or its share among several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from hflow_rt.limits import check_count
from hflow_rt.memory import need

__all__ = ["Alone", "Shares", "Track", "batches", "silent"]

T = TypeVar("T")

# shows that something takes a while: called with what is being done and the batches to do, yields them
Track = Callable[[str, Sequence[range]], Iterable[range]]


class Shares(Protocol):
    """What an evaluation needs of `hflow_rt.training.processes.Processes`."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and reports."""

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that this process works on."""

    def collect(self, results: list[T]) -> list[T]:
        """What all processes made of their shares, in the order of the items; the same list in each of them."""

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""


class Alone:
    """One process does everything."""

    is_main = True

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items

    def collect(self, results: list[T]) -> list[T]:
        return results

    def any(self, flag: bool) -> bool:
        return flag


def batches(count: int, size: int) -> list[range]:
    """0 .. count - 1 in ranges of `size`, the last one shorter. Raises `DataError` for a size below 1."""
    check_count("the batch", size)
    need(100 * count / size, f"{count:,} images in batches of {size:,}", "ask for fewer images")
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def silent(label: str, parts: Sequence[range]) -> Iterable[range]:
    """A `Track` that shows nothing."""
    return parts
