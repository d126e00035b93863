"""How many threads ONNX Runtime computes with."""

import gc
import os
from pathlib import Path

import pytest

from hflow_rt.runtime import load
from hflow_rt.runtime.engines.cpu import threads as chosen

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")


@pytest.mark.parametrize("threads", [1, 3])
def test_the_pool_is_as_large_as_omp_num_threads_says(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    gc.collect()  # sessions of other tests, with their threads
    before = len(os.listdir("/proc/self/task"))
    with load(tiny_run, "onnx", "cpu") as session:
        session.sample(1)
        assert len(os.listdir("/proc/self/task")) - before == threads - 1  # the caller is one of them


def test_a_process_held_to_fewer_cores_starts_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5})
    assert chosen() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert chosen() == 0  # ONNX Runtime knows better which cores are real ones
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert chosen() == 0
