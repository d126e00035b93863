"""The CUDA driver through ctypes: which GPUs there are, and the memory, streams and graphs an engine needs.

The driver is all that a machine with a GPU is sure to have: no CUDA toolkit, torch or wrapper package is needed. The
primary context is used, which is torch's too, so that tensors of either are good for the other.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hflow_rt.errors import BackendUnavailable

__all__ = ["Cuda", "Gpu", "chosen_gpu", "find_gpus"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile


@dataclass(frozen=True)
class Gpu:
    """A GPU: its number, the name its driver gives it, its compute capability such as `8.9`, its bytes of memory."""

    index: int
    name: str
    capability: str
    memory: int


def find_gpus() -> list[Gpu]:
    """The GPUs that CUDA can use here; none where there is no driver, or where it refuses."""
    try:
        cuda = _driver()
        count = cuda.integer("cuDeviceGetCount")
        return [cuda.gpu(index) for index in range(count)]
    except BackendUnavailable:
        return []


def chosen_gpu() -> Gpu | None:
    """The GPU that this process uses, one each for processes launched together, or None where there is none."""
    gpus = find_gpus()
    index = int(os.environ.get("LOCAL_RANK", "0"))
    return gpus[index] if index < len(gpus) else None


class Cuda:
    """The driver functions that run an engine on one GPU. Addresses and handles are plain numbers.

    Every method raises `BackendUnavailable` with the driver's own name of an error.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._driver = _driver()
        self._context = self._driver.handle("cuDevicePrimaryCtxRetain", self._driver.device(gpu.index))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU this thread's for the time being."""
        self._driver("cuCtxPushCurrent_v2", _pointer(self._context))
        try:
            yield
        finally:
            self._driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, size: int) -> int:
        """Bytes on the GPU."""
        return self._driver.handle("cuMemAlloc_v2", ctypes.c_size_t(size))

    def free(self, address: int) -> None:
        self._driver("cuMemFree_v2", _pointer(address))

    def allocate_host(self, size: int) -> int:
        """Pinned bytes of the host, which copies reach without a detour."""
        return self._driver.handle("cuMemHostAlloc", ctypes.c_size_t(size), ctypes.c_uint(0))

    def free_host(self, address: int) -> None:
        self._driver("cuMemFreeHost", _pointer(address))

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Host to GPU, in the order of the stream."""
        self._driver(
            "cuMemcpyHtoDAsync_v2", _pointer(target), _pointer(source), ctypes.c_size_t(size), _pointer(stream)
        )

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """GPU to host, in the order of the stream."""
        self._driver(
            "cuMemcpyDtoHAsync_v2", _pointer(target), _pointer(source), ctypes.c_size_t(size), _pointer(stream)
        )

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """GPU to GPU, in the order of the stream."""
        self._driver(
            "cuMemcpyDtoDAsync_v2", _pointer(target), _pointer(source), ctypes.c_size_t(size), _pointer(stream)
        )

    def stream(self) -> int:
        """A new stream that waits for no other."""
        return self._driver.handle("cuStreamCreate", ctypes.c_uint(_NON_BLOCKING))

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done everything."""
        self._driver("cuStreamSynchronize", _pointer(stream))

    def destroy_stream(self, stream: int) -> None:
        self._driver("cuStreamDestroy_v2", _pointer(stream))

    def order(self, first: int, then: int) -> None:
        """What is queued on stream `then` from now on waits for what stream `first` holds now."""
        event = self._driver.handle("cuEventCreate", ctypes.c_uint(_NO_TIMING))
        self._driver("cuEventRecord", _pointer(event), _pointer(first))
        self._driver("cuStreamWaitEvent", _pointer(then), _pointer(event), ctypes.c_uint(0))
        self._driver("cuEventDestroy_v2", _pointer(event))  # the driver keeps it until it is reached

    def begin_capture(self, stream: int) -> None:
        """Record what is queued on the stream instead of doing it."""
        self._driver("cuStreamBeginCapture_v2", _pointer(stream), ctypes.c_int(_THREAD_LOCAL))

    def end_capture(self, stream: int) -> int:
        """What was recorded, as an executable graph."""
        graph = ctypes.c_void_p()
        self._driver("cuStreamEndCapture", _pointer(stream), ctypes.byref(graph))
        try:
            return self._driver.handle("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
        finally:
            self._driver("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Queue an executable graph."""
        self._driver("cuGraphLaunch", _pointer(graph), _pointer(stream))

    def destroy_graph(self, graph: int) -> None:
        self._driver("cuGraphExecDestroy", _pointer(graph))


class _Driver:
    """Calls functions of the driver's library and turns their error codes into exceptions."""

    def __init__(self) -> None:
        try:
            self._library: Any = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise BackendUnavailable(f"no NVIDIA driver here ({_LIBRARY} cannot be loaded)") from error
        self("cuInit", ctypes.c_uint(0))

    def __call__(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            name = (text.value or b"").decode() or f"error {code}"
            raise BackendUnavailable(f"CUDA reports {name} in {function}; see 'nvidia-smi' and 'hflow-rt doctor'")

    def integer(self, function: str, *arguments: Any) -> int:
        value = ctypes.c_int()
        self(function, ctypes.byref(value), *arguments)
        return value.value

    def handle(self, function: str, *arguments: Any) -> int:
        value = ctypes.c_void_p()
        self(function, ctypes.byref(value), *arguments)
        return value.value or 0

    def device(self, index: int) -> ctypes.c_int:
        return ctypes.c_int(self.integer("cuDeviceGet", ctypes.c_int(index)))

    def gpu(self, index: int) -> Gpu:
        device = self.device(index)
        name = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        major, minor = (self.integer("cuDeviceGetAttribute", ctypes.c_int(which), device) for which in _CAPABILITY)
        memory = self.handle("cuDeviceTotalMem_v2", device)
        return Gpu(index, name.value.decode(), f"{major}.{minor}", memory)


@functools.cache
def _driver() -> _Driver:
    return _Driver()


def _pointer(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)
