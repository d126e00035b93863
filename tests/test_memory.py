"""Memory is asked before it is taken."""

import pytest

from hflow_rt import memory
from hflow_rt.errors import OutOfMemory


def test_what_fits_passes_and_what_does_not_is_refused() -> None:
    memory.need(2**30, "this", "ask for less", room=2**30)
    with pytest.raises(OutOfMemory, match=r"this would take 1\.5 GiB of memory, and 1\.0 GiB are free; ask for less"):
        memory.need(1.5 * 2**30, "this", "ask for less", room=2**30)


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    import psutil

    before = memory.available()
    assert 0 < before <= psutil.virtual_memory().total
    taken = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (taken + 2**28, -1))
    assert memory.available() <= 2**28


def test_only_lack_of_memory_is_translated() -> None:
    with pytest.raises(OutOfMemory, match="out of memory here; ask for less"), memory.guarded("here", "ask for less"):
        raise MemoryError
    with pytest.raises(ZeroDivisionError), memory.guarded("here", "ask for less"):
        raise ZeroDivisionError
