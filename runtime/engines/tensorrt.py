"""TensorRT backend: runs the plans of a bundle on the GPU they were built for, or says in one line why not.

A plan is deserialized once. Each batch size that comes gets an execution context with a stream, device buffers and,
from its second run on, a CUDA graph of its own (a `Lane`); threads that call at the same time get a lane each.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import BackendUnavailable, EngineMismatch
from hflow_rt.manifest import Tensor
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.engines.cuda import Cuda, Gpu, chosen_gpu
from hflow_rt.runtime.engines.device_buffers import Lane
from hflow_rt.runtime.engines.engine import Calls, Engine
from hflow_rt.runtime.engines.plans import Product, build_command, choose_engines, installed, plan_file, product

__all__ = ["TensorRTEngine", "error_logger", "open_engine"]

_IDLE = 8  # lanes kept per graph: each batch size costs memory for activations
Array = NDArray[np.float32]


class TensorRTEngine(Engine):
    """Runs the plans `key` of a bundle on `gpu`. Safe to share between threads."""

    def __init__(self, bundle: Bundle, key: str, found: Product, gpu: Gpu, cuda: Cuda, cuda_graph: bool = True) -> None:
        super().__init__(bundle)
        self.key = self._key = key
        self._product, self._gpu, self._cuda = found, gpu, cuda
        self._engines = bundle.manifest.engines[key]
        self.tensors, self.largest = f"cuda:{gpu.index}", self._engines.batch[2]
        self._cuda_graph = cuda_graph
        self._messages: list[str] = []
        self._lock = Lock()
        self._plans: dict[str, _Plan] = {}
        with cuda.current():
            self._logger = error_logger(found.api, self._messages)
            self._runtime = found.api.Runtime(self._logger)
            self._runtime.engine_host_code_allowed = False  # a plan is data; code of the host in it is not run
        # also at exit: contexts must go before the driver does
        self._released = weakref.finalize(self, _release, cuda, self._plans, [self._runtime])

    @property
    def backend(self) -> str:
        return f"{self._product.title} on {self._gpu.name}"

    @property
    def graphs(self) -> tuple[str, ...]:
        return tuple(self._engines.plans)

    @property
    def verified(self) -> bool:
        return self._engines.verified

    def close(self) -> None:
        with self._lock:
            self._released()
            self._runtime = None

    def run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        with self._cuda.current(), self._lane(graph, inputs) as lane:
            return lane.run(inputs)

    def loop(self, calls: Calls) -> Iterator[Mapping[str, Any]]:
        if not calls.on_host:
            yield from super().loop(calls)
            return
        with self._cuda.current(), self._lane(calls.graph, list(calls.first.values())) as lane:
            yield from lane.loop(calls)

    def _lane(self, graph: str, inputs: Sequence[Any]) -> contextlib.AbstractContextManager[Lane]:
        return self._plan(graph).lane(max(*(len(array) for array in inputs), self._engines.batch[0]))

    def _plan(self, graph: str) -> "_Plan":
        with self._lock:
            if not self._released.alive:
                raise BackendUnavailable("this session was closed; load the model again")
            if graph not in self._plans:
                path = plan_file(self._bundle, self._key, graph)
                again = f"build it again with {build_command(self._bundle.path, self._engines)}"
                self._messages.clear()
                with self._cuda.current():
                    engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
                if engine is None:
                    reason = self._messages[0] if self._messages else "it gives no reason"
                    raise EngineMismatch(f"{self._product.title} refuses {path}: {reason}; {again}")
                described = self._bundle.manifest.graphs[graph]
                _check_signature(engine, (*described.inputs, *described.outputs), f"{path} must have", again)
                self._plans[graph] = _Plan(self, engine, described.inputs, described.outputs)
            return self._plans[graph]

    def new_lane(self, engine: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor], batch: int) -> Lane:
        """A context at one batch size, made under the lock: the logger's last words are then about it."""
        with self._lock:
            self._messages.clear()
            context = _context(self._product, engine, self._cuda_graph)
            if context is None:
                reason = self._messages[0] if self._messages else "it gives no reason"
                raise BackendUnavailable(
                    f"{self._product.title} cannot make a context of batch {batch}: {reason}; use a smaller batch"
                )
        capture = self._cuda_graph and self._product.flavor == "tensorrt"
        return Lane(self._cuda, context, inputs, outputs, batch, capture, self._messages)


class _Plan:
    """A deserialized engine and its lanes, those that nobody uses by batch size."""

    def __init__(self, owner: TensorRTEngine, engine: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._owner = weakref.ref(owner)
        self.engine, self._inputs, self._outputs = engine, inputs, outputs
        self._idle: list[Lane] = []
        self._lock = Lock()

    @contextlib.contextmanager
    def lane(self, batch: int) -> Iterator[Lane]:
        """A lane of this batch size for the caller alone. One that failed is not used again."""
        with self._lock:
            found = next((lane for lane in reversed(self._idle) if lane.batch == batch), None)
            if found is not None:
                self._idle.remove(found)
        owner = self._owner()
        assert owner is not None  # it is running
        lane = found or owner.new_lane(self.engine, self._inputs, self._outputs, batch)
        try:
            yield lane
        except BaseException:
            lane.close()
            raise
        with self._lock:
            self._idle.append(lane)
            longest_idle = self._idle.pop(0) if len(self._idle) > _IDLE else None
        if longest_idle is not None:
            longest_idle.close()

    def close(self) -> None:
        """Contexts first, then the engine they are of."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()
            self.engine = None


def open_engine(bundle: Bundle, device: str, cuda_graph: bool = True) -> TensorRTEngine:
    """The engine on this machine's GPU.

    Raises `BackendUnavailable` without a GPU or TensorRT, `EngineMismatch` where no plan of the bundle fits, and
    `BundleError` where it has none. Nothing of TensorRT is touched before a GPU was found: its runtime would take the
    process down.
    """
    if device == "cpu":
        raise BackendUnavailable("TensorRT engines run on a GPU only; omit --device, or use --backend onnx")
    gpu = chosen_gpu()
    if gpu is None:
        raise BackendUnavailable(
            "TensorRT engines run on an NVIDIA GPU and none was found here (see 'hflow-rt doctor'); run this on the"
            " machine with the GPU, or use --backend onnx"
        )
    found = _product(bundle, gpu)
    return TensorRTEngine(bundle, choose_engines(bundle, found, gpu), found, gpu, Cuda(gpu), cuda_graph)


def _product(bundle: Bundle, gpu: Gpu) -> Product:
    """The product that the newest plans of the bundle are for, else the one that is installed, to be told apart."""
    flavors = [engines.flavor for engines in bundle.manifest.engines.values()]
    for flavor in reversed(flavors):
        with contextlib.suppress(BackendUnavailable):
            return product(flavor)
    return product(flavors[-1] if flavors and not installed() else None, gpu)


def _check_signature(engine: Any, tensors: Sequence[Tensor], must: str, again: str) -> None:
    found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    wanted = {tensor.name for tensor in tensors}
    if found != wanted:
        raise EngineMismatch(f"{must} {', '.join(sorted(wanted))}, not {', '.join(sorted(found))}; {again}")
    for tensor in tensors:
        shape = tuple(engine.get_tensor_shape(tensor.name))[1:]
        dtype = engine.get_tensor_dtype(tensor.name).name
        if (dtype, shape) != ("FLOAT", tensor.shape):
            raise EngineMismatch(
                f"{must} float {tensor.name} {list(tensor.shape)}, not {dtype.lower()} {list(shape)}; {again}"
            )


def _context(found: Product, engine: Any, cuda_graph: bool) -> Any:
    """A context; TensorRT for RTX, which compiles kernels as it runs, captures its CUDA graphs itself."""
    if found.flavor == "tensorrt":
        return engine.create_execution_context()
    settings = engine.create_runtime_config()
    strategies = found.api.CudaGraphStrategy
    settings.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graph else strategies.DISABLED
    return engine.create_execution_context(settings)


def error_logger(api: Any, messages: list[str]) -> Any:
    """A TensorRT logger that puts what went wrong into `messages`."""

    class Logger(api.ILogger):  # type: ignore[misc]
        """Keeps what went wrong: ours is the one line that explains it."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Logger()


def _release(cuda: Cuda, plans: dict[str, _Plan], runtime: list[Any]) -> None:
    """Lanes, then engines, then the runtime."""
    with contextlib.suppress(BackendUnavailable), cuda.current():
        for plan in plans.values():
            plan.close()
        plans.clear()
        runtime.clear()
