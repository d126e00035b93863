"""Keep the engine busy: what comes next is made ready, and what is done is written, while it computes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["Behind", "ahead"]

T = TypeVar("T")
_END = object()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, the next of which is made in a thread while the caller works on the last."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming: Future[Any] = pool.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, items, _END)
            yield item


class Behind:
    """Work that is done in threads behind the caller's back, at most `depth` pieces of it waiting.

    A failure is raised by a later `do` or at the end. Leaving the block by an exception drops what has not begun.
    """

    def __init__(self, threads: int = 2, depth: int = 4) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="behind")
        self._depth = depth
        self._waiting: deque[Future[Any]] = deque()

    def do(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Queue `work(*arguments)`, after waiting for room."""
        while len(self._waiting) >= self._depth:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work, *arguments))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for work in self._waiting:
                work.result()
