"""Several batches under way at once."""

import threading
from collections.abc import Iterator

import pytest

from hflow_rt.runtime.in_flight import in_flight


def test_items_are_made_and_worked_on_at_once_and_come_in_order() -> None:
    together = threading.Barrier(3, timeout=10)
    made: list[int] = []

    def items() -> Iterator[int]:
        for index in range(6):
            made.append(index)
            yield index

    def work(index: int) -> int:
        together.wait()  # breaks unless three are under way
        return 10 * index

    found = in_flight(work, items(), number=3)
    assert next(found) == 0
    assert made == [0, 1, 2]  # no more than fit
    assert list(found) == [10, 20, 30, 40, 50]


def test_fewer_items_than_fit() -> None:
    assert list(in_flight(str, range(2), number=8)) == ["0", "1"]
    assert list(in_flight(str, [])) == []


def test_a_failure_comes_in_its_place_and_drops_what_has_not_begun() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def work(index: int) -> int:
        begun.append(index)
        gate.wait(10)
        if index == 1:
            raise OSError("disk full")
        return index

    found = in_flight(work, range(100), number=2)
    gate.set()
    assert next(found) == 0
    with pytest.raises(OSError, match="disk full"):
        list(found)
    assert len(begun) < 5


def test_a_failure_in_the_making_of_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(in_flight(str, items()))


def test_a_caller_that_stops_early_waits_for_what_runs_and_no_more() -> None:
    done: list[int] = []
    found = in_flight(done.append, range(100), number=2)
    next(found)
    found.close()
    assert len(done) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("in-flight")]
