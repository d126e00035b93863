"""What of CUDA an engine needs: which GPUs there are, memory, streams and graphs, by NVIDIA's bindings of its driver.

The primary context is used, which is torch's too, so that tensors of either are good for the other.
"""

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hflow_rt.errors import BackendUnavailable
from hflow_rt.extras import needed

__all__ = ["Cuda", "Gpu", "chosen_gpu", "find_gpus"]


@dataclass(frozen=True)
class Gpu:
    """A GPU: its number, the name its driver gives it, its compute capability such as `8.9`, its bytes of memory."""

    index: int
    name: str
    capability: str
    memory: int


def find_gpus() -> list[Gpu]:
    """The GPUs that CUDA can use here; none where there is no driver, or where it refuses.

    Raises `BackendUnavailable` where the bindings are missing.
    """
    _bindings()
    try:
        return [_gpu(index) for index in range(_call("cuDeviceGetCount"))]
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
        self._context = _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", gpu.index))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU this thread's for the time being."""
        _call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent")

    def allocate(self, size: int) -> int:
        """Bytes on the GPU."""
        return int(_call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        _call("cuMemFree", address)

    def allocate_host(self, size: int) -> int:
        """Pinned bytes of the host, which copies reach without a detour."""
        return int(_call("cuMemHostAlloc", size, 0))

    def free_host(self, address: int) -> None:
        _call("cuMemFreeHost", address)

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Host to GPU, in the order of the stream."""
        _call("cuMemcpyHtoDAsync", target, source, size, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """GPU to host, in the order of the stream."""
        _call("cuMemcpyDtoHAsync", target, source, size, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """GPU to GPU, in the order of the stream."""
        _call("cuMemcpyDtoDAsync", target, source, size, stream)

    def stream(self) -> int:
        """A new stream that waits for no other."""
        return int(_call("cuStreamCreate", _bindings().CUstream_flags.CU_STREAM_NON_BLOCKING))

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done everything."""
        _call("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        _call("cuStreamDestroy", stream)

    def order(self, first: int, then: int) -> None:
        """What is queued on stream `then` from now on waits for what stream `first` holds now."""
        event = _call("cuEventCreate", _bindings().CUevent_flags.CU_EVENT_DISABLE_TIMING)
        _call("cuEventRecord", event, first)
        _call("cuStreamWaitEvent", then, event, 0)
        _call("cuEventDestroy", event)  # the driver keeps it until it is reached

    def begin_capture(self, stream: int) -> None:
        """Record what is queued on the stream instead of doing it; other threads may allocate meanwhile."""
        _call("cuStreamBeginCapture", stream, _bindings().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """What was recorded, as an executable graph."""
        graph = _call("cuStreamEndCapture", stream)
        try:
            return int(_call("cuGraphInstantiate", graph, 0))
        finally:
            _call("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Queue an executable graph."""
        _call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        _call("cuGraphExecDestroy", graph)


def _gpu(index: int) -> Gpu:
    device, attribute = _call("cuDeviceGet", index), _bindings().CUdevice_attribute
    name = _call("cuDeviceGetName", 256, device).rstrip(b"\0").decode()
    major, minor = (
        _call("cuDeviceGetAttribute", which, device)
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return Gpu(index, name, f"{major}.{minor}", int(_call("cuDeviceTotalMem", device)))


def _call(function: str, *arguments: Any) -> Any:
    """What a function of the driver yields, its error code turned into an exception."""
    code, *values = getattr(_driver(), function)(*arguments)
    _check(code, function)
    return values[0] if values else None


def _check(code: Any, function: str) -> None:
    if int(code):
        raise BackendUnavailable(f"CUDA reports {code.name} in {function}; see 'nvidia-smi' and 'hflow-rt doctor'")


@functools.cache
def _driver() -> Any:
    """The bindings, with the driver loaded and initialised."""
    driver = _bindings()
    try:
        code, *_ = driver.cuInit(0)
    except RuntimeError as error:  # the library that comes with the driver
        raise BackendUnavailable("no NVIDIA driver here: its library cannot be loaded") from error
    _check(code, "cuInit")
    return driver


def _bindings() -> Any:
    with needed("cuda", "a GPU is reached through cuda-bindings: pip install 'hflow-rt[trt]', or [rtx] or [gpu]"):
        return importlib.import_module("cuda.bindings.driver")
