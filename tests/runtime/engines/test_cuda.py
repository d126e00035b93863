"""The CUDA driver through ctypes, with a library that plays it."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from hflow_rt.errors import BackendUnavailable
from hflow_rt.runtime.engines import cuda as module
from hflow_rt.runtime.engines.cuda import Cuda, Gpu, chosen_gpu, find_gpus


class Library:
    """libcuda with two GPUs; a function named in `errors` returns that code."""

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.errors:
                return self.errors[name]
            result = getattr(arguments[0], "_obj", None) if arguments else None
            if name == "cuDeviceGetCount":
                result.value = 2
            elif name == "cuDeviceGet":
                result.value = 10 + arguments[1].value
            elif name == "cuDeviceGetName":
                arguments[0].value = f"NVIDIA Toy {arguments[2].value - 10}".encode()
            elif name == "cuDeviceGetAttribute":
                result.value = {75: 8, 76: 9}[arguments[1].value]
            elif name == "cuDeviceTotalMem_v2":
                result.value = 24 << 30
            elif name == "cuMemAlloc_v2":
                result.value = 0x7000
            elif name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
            return 0

        return call


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    fake = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    module._driver.cache_clear()
    yield fake
    module._driver.cache_clear()


def test_gpus(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [Gpu(index, f"NVIDIA Toy {index}", "8.9", 24 << 30) for index in range(2)]
    assert find_gpus() == expected
    assert chosen_gpu() == expected[0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert chosen_gpu() == expected[1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert chosen_gpu() is None


def test_a_driver_that_refuses(library: Library) -> None:
    library.errors["cuInit"] = 100
    assert find_gpus() == []


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    module._driver.cache_clear()
    assert find_gpus() == []
    module._driver.cache_clear()


def test_errors_have_their_names(library: Library) -> None:
    cuda = Cuda(find_gpus()[0])
    with cuda.current():
        assert cuda.allocate(100) == 0x7000
        library.errors["cuMemAlloc_v2"] = 2
        with pytest.raises(BackendUnavailable, match="CUDA reports CUDA_ERROR_OUT_OF_MEMORY in cuMemAlloc_v2; see"):
            cuda.allocate(100)
    assert library.calls[-1] == "cuCtxPopCurrent_v2"


def test_streams_in_order(library: Library) -> None:
    cuda = Cuda(find_gpus()[0])
    library.calls.clear()
    cuda.order(1, 2)
    assert library.calls == ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy_v2"]
    library.calls.clear()
    cuda.begin_capture(1)
    cuda.end_capture(1)
    cuda.launch(3, 1)
    assert library.calls == [
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphLaunch",
    ]
