"""What runs ahead of and behind an engine."""

import threading
from collections.abc import Iterator

import pytest

from hflow_rt.runtime.overlap import Behind, ahead


def test_the_next_item_is_made_while_the_last_is_worked_on() -> None:
    made = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        made.set()
        yield 1

    found = ahead(items())
    assert next(found) == 0
    assert made.wait(10)  # without asking for it
    assert list(found) == [1]


def test_order_and_failures_of_what_is_ahead_are_kept() -> None:
    assert list(ahead(iter(range(50)))) == list(range(50))

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    found = ahead(broken())
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)


def test_work_behind_is_done_at_the_end_and_never_piles_up() -> None:
    gate, done = threading.Event(), []

    def work(index: int) -> None:
        gate.wait(10)
        done.append(index)

    with Behind(threads=1, depth=2) as behind:
        behind.do(work, 0)
        behind.do(work, 1)
        threading.Timer(0.05, gate.set).start()
        behind.do(work, 2)  # waits for room
        assert gate.is_set()
        assert done[:1] == [0]
    assert done == [0, 1, 2]


def test_a_failure_behind_is_raised() -> None:
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Behind() as behind:
        behind.do(fail)


def test_an_exception_drops_what_has_not_begun() -> None:
    started, gate, done = threading.Event(), threading.Event(), []

    def work(index: int) -> None:
        started.set()
        gate.wait(10)
        done.append(index)

    def interrupted() -> None:
        with Behind(threads=1) as behind:
            behind.do(work, 0)
            behind.do(work, 1)
            started.wait(10)
            threading.Timer(0.05, gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [0]
