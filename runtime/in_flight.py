"""Keep every processor busy: several batches under way together, each from its latents to its files."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_flight"]

T = TypeVar("T")
R = TypeVar("R")


def in_flight(work: Callable[[T], R], items: Iterable[T], number: int = 3) -> Iterator[R]:
    """`work` of every item, in order, while up to `number` of them are under way in threads of their own.

    The next items are made in the caller's thread meanwhile. A failure is raised in its place, and then, as when the
    caller stops early, what has not begun is dropped.
    """
    pool = ThreadPoolExecutor(number, thread_name_prefix="in-flight")
    under_way: deque[Future[R]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) == number:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
