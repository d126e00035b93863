"""NVIDIA's bindings of its driver, played by a module of the same functions; and the real ones, without a GPU."""

import enum
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from hflow_rt.errors import BackendUnavailable
from hflow_rt.runtime.engines import cuda as module
from hflow_rt.runtime.engines.cuda import Cuda, Gpu, chosen_gpu, find_gpus


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100


class CUdevice_attribute(enum.IntEnum):  # noqa: N801, as the real one
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUstream_flags(enum.IntEnum):  # noqa: N801
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(enum.IntEnum):  # noqa: N801
    CU_EVENT_DISABLE_TIMING = 2


ENUMS = (CUresult, CUdevice_attribute, CUstreamCaptureMode, CUstream_flags, CUevent_flags)


class Driver(ModuleType):
    """`cuda.bindings.driver` with two GPUs; a function named in `errors` returns that code."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        vars(self).update({one.__name__: one for one in ENUMS})
        self.errors: dict[str, int] = {}
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name in self.errors:
                return (CUresult(self.errors[name]), None)
            values: dict[str, Any] = {
                "cuDeviceGetCount": lambda: 2,
                "cuDeviceGet": lambda: 10 + arguments[0],
                "cuDeviceGetName": lambda: f"NVIDIA Toy {arguments[1] - 10}".encode().ljust(arguments[0], b"\0"),
                "cuDeviceGetAttribute": lambda: {75: 8, 76: 9}[arguments[0]],
                "cuDeviceTotalMem": lambda: 24 << 30,
                "cuDevicePrimaryCtxRetain": lambda: 5,
                "cuMemAlloc": lambda: 0x7000,
                "cuEventCreate": lambda: 8,
                "cuStreamEndCapture": lambda: 20,
                "cuGraphInstantiate": lambda: 30,
            }
            found = (values[name](),) if name in values else ()
            return (CUresult.CUDA_SUCCESS, *found)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake, package = Driver(), ModuleType("cuda.bindings")
    package.driver = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    module._driver.cache_clear()
    yield fake
    module._driver.cache_clear()


def test_gpus(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [Gpu(index, f"NVIDIA Toy {index}", "8.9", 24 << 30) for index in range(2)]
    assert find_gpus() == expected
    assert chosen_gpu() == expected[0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert chosen_gpu() == expected[1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert chosen_gpu() is None


def test_a_driver_that_refuses(driver: Driver) -> None:
    driver.errors["cuInit"] = 100
    assert find_gpus() == []


def test_no_driver(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flags: int) -> None:
        raise RuntimeError("libcuda.so.1 was not found")

    monkeypatch.setattr(driver, "cuInit", missing, raising=False)
    assert find_gpus() == []


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendUnavailable, match=r"through cuda-bindings: pip install 'hflow-rt\[trt\]', or"):
        find_gpus()


def test_errors_have_their_names(driver: Driver) -> None:
    cuda = Cuda(find_gpus()[0])
    with cuda.current():
        assert cuda.allocate(100) == 0x7000
        driver.errors["cuMemAlloc"] = 2
        with pytest.raises(BackendUnavailable, match="CUDA reports CUDA_ERROR_OUT_OF_MEMORY in cuMemAlloc; see"):
            cuda.allocate(100)
    assert driver.calls[-1] == ("cuCtxPopCurrent",)


def test_streams_in_order(driver: Driver) -> None:
    cuda = Cuda(find_gpus()[0])
    driver.calls.clear()
    cuda.order(1, 2)
    assert driver.calls == [
        ("cuEventCreate", 2), ("cuEventRecord", 8, 1), ("cuStreamWaitEvent", 2, 8, 0), ("cuEventDestroy", 8)
    ]  # fmt: skip
    driver.calls.clear()
    cuda.begin_capture(1)
    assert cuda.end_capture(1) == 30
    cuda.launch(30, 1)
    assert driver.calls == [
        ("cuStreamBeginCapture", 1, 1), ("cuStreamEndCapture", 1), ("cuGraphInstantiate", 20, 0),
        ("cuGraphDestroy", 20), ("cuGraphLaunch", 30, 1),
    ]  # fmt: skip


def test_the_real_bindings_have_what_is_called() -> None:
    """Numbers are taken as handles, and the flags are those of the toy."""
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    for one in ENUMS:
        assert {member.name: int(getattr(getattr(real, one.__name__), member.name)) for member in one} == {
            member.name: member.value for member in one
        }
    names = [constant for constant in _constants(module) if constant.startswith("cu") and constant[2:3].isupper()]
    assert len(names) > 25
    assert all(callable(getattr(real, name)) for name in names)
    assert [int(kind(7)) for kind in (real.CUstream, real.CUdeviceptr, real.CUgraphExec, real.CUevent)] == [7] * 4


def _constants(found: ModuleType) -> set[str]:
    """Names in quotes that are functions of the driver."""
    import ast
    import inspect

    tree = ast.walk(ast.parse(inspect.getsource(found)))
    return {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
