"""TensorRT and the CUDA driver played by the CPU: what is asked of them is written down, and engines really compute.

Addresses are those of numpy arrays, copies are real, and an engine runs its ONNX graph. So results can be compared,
and what would be undefined on a GPU, such as reading memory that was given back, fails here.
"""

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from hflow_rt.errors import BackendUnavailable
from hflow_rt.runtime.bundle import Bundle


class FakeCuda:
    """Stands in for `hflow_rt.runtime.engines.cuda.Cuda`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: dict[int, list[Callable[[], None]]] = {}
        self.entered = 0
        self.dead = False  # as after an illegal access: every call fails

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    @contextmanager
    def current(self) -> Iterator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1

    def _said(self, *call: Any) -> None:
        assert self.entered, f"{call[0]} without the GPU"
        if self.dead:
            raise BackendUnavailable("CUDA reports CUDA_ERROR_ILLEGAL_ADDRESS")
        self.calls.append(call)

    def _allocate(self, size: int) -> int:
        block = np.full(size, 0xFF, np.uint8)  # NaN, as float32
        self.memory[block.ctypes.data] = block
        return block.ctypes.data

    def allocate(self, size: int) -> int:
        self._said("allocate", size)
        return self._allocate(size)

    def allocate_host(self, size: int) -> int:
        self._said("allocate_host", size)
        return self._allocate(size)

    def free(self, address: int) -> None:
        self._said("free", self.memory.pop(address).nbytes)

    free_host = free

    def _move(self, name: str, target: int, source: int, size: int, stream: int) -> None:
        assert stream in self.streams
        self._said(name, size)
        ctypes.memmove(target, source, size)

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        assert self.memory[target].nbytes == size
        self._move("upload", target, source, size, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        assert self.memory[source].nbytes >= size
        self._move("download", target, source, size, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._move("copy", target, source, size, stream)

    def stream(self) -> int:
        self._said("stream")
        self.streams.add(len(self.calls))
        return len(self.calls)

    def synchronize(self, stream: int) -> None:
        assert stream in self.streams
        self._said("synchronize")

    def destroy_stream(self, stream: int) -> None:
        self._said("destroy_stream")
        self.streams.remove(stream)

    def order(self, first: int, then: int) -> None:
        self._said("order", first, then)

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        assert stream in self.streams
        if stream in self.recording:
            self.recording[stream].append(work)
        else:
            work()

    def begin_capture(self, stream: int) -> None:
        self._said("begin_capture")
        self.recording[stream] = []

    def end_capture(self, stream: int) -> int:
        self._said("end_capture")
        self.graphs[len(self.calls)] = self.recording.pop(stream)
        return len(self.calls)

    def launch(self, graph: int, stream: int) -> None:
        self._said("launch")
        for work in self.graphs[graph]:
            work()

    def destroy_graph(self, graph: int) -> None:
        self._said("destroy_graph")
        del self.graphs[graph]


class FakeTensorRT:
    """A module like `tensorrt` or `tensorrt_rtx`. `refuse` holds calls that are to fail.

    A plan is the name of its graph; one that was refitted is that, `@` and its number in `graphs`.
    """

    def __init__(self, bundle: Bundle, cuda: FakeCuda, version: str = "10.16.1.11") -> None:
        self.__version__, self.__spec__ = version, object()
        self.refuse: set[str] = set()
        self.contexts = 0
        self.strategies: list[str] = []
        self.graphs: list[bytes] = []
        self.flags: list[str] = []
        self.layers: list[Any] = []
        fake = self
        sessions = {
            name: onnxruntime.InferenceSession(str(bundle.graph(name)), providers=["CPUExecutionProvider"])
            for name in bundle.manifest.graphs
        }

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

            def log(self, severity: int, message: str) -> None:
                raise NotImplementedError

        class Runtime:
            engine_host_code_allowed = True

            def __init__(self, logger: ILogger) -> None:
                cuda._said("Runtime")
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> "Engine | None":
                cuda._said("deserialize_cuda_engine")
                assert self.engine_host_code_allowed is False
                self.logger.log(ILogger.WARNING, "a warning")
                if "deserialize" in fake.refuse:
                    self.logger.log(ILogger.ERROR, "magic tag does not match")
                    return None
                return Engine(self.logger, data.decode())

        class Engine:
            def __init__(self, logger: ILogger, name: str) -> None:
                name, _, number = name.partition("@")
                self.logger, self.name, self.session = logger, name, sessions[name]
                if number:
                    self.session = onnxruntime.InferenceSession(
                        fake.graphs[int(number)], providers=["CPUExecutionProvider"]
                    )
                self.refittable = "refittable" not in fake.refuse
                graph = bundle.manifest.graphs[name]
                self.tensors = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
                self.inputs = {tensor.name for tensor in graph.inputs}
                self.num_io_tensors = len(self.tensors)

            def get_tensor_name(self, index: int) -> str:
                return "other" if "names" in fake.refuse else list(self.tensors)[index]

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                return (*self.tensors[name].batched(-1), *((2,) if "shapes" in fake.refuse else ()))

            def get_tensor_dtype(self, name: str) -> Any:
                return SimpleNamespace(name="HALF" if "types" in fake.refuse else "FLOAT")

            def create_engine_inspector(self) -> Any:
                cuda._said("create_engine_inspector")
                return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": fake.layers}))

            def create_serialization_config(self) -> Any:
                return SimpleNamespace(
                    clear_flag=lambda flag: fake.flags.append(f"-{flag}"),
                    set_flag=lambda flag: fake.flags.append(f"+{flag}"),
                )

            def serialize_with_config(self, config: Any) -> bytes | None:
                cuda._said("serialize_with_config")
                return None if "serialize" in fake.refuse else f"{self.name}@{len(fake.graphs) - 1}".encode()

            def create_runtime_config(self) -> Any:
                return SimpleNamespace(cuda_graph_strategy=None)

            def create_execution_context(self, settings: Any = None) -> "Context | None":
                cuda._said("create_execution_context")
                fake.strategies.append("" if settings is None else settings.cuda_graph_strategy)
                if "context" in fake.refuse:
                    self.logger.log(ILogger.ERROR, "out of memory")
                    return None
                fake.contexts += 1
                return Context(self)

        class Context:
            def __init__(self, engine: Engine) -> None:
                self.engine = engine
                self.shapes: dict[str, tuple[int, ...]] = {}
                self.addresses: dict[str, int] = {}
                self.busy = False

            def __del__(self) -> None:
                fake.contexts -= 1

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                cuda._said("set_input_shape", name, shape)
                self.shapes[name] = shape
                return "input_shape" not in fake.refuse

            def infer_shapes(self) -> list[str]:
                if "infer" in fake.refuse:
                    raise RuntimeError("no shapes")
                return sorted(self.engine.inputs - self.shapes.keys())

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                return self.engine.tensors[name].batched(max(shape[0] for shape in self.shapes.values()))

            def set_tensor_address(self, name: str, address: int) -> bool:
                self.addresses[name] = address
                return True

            def execute_async_v3(self, stream: int) -> bool:
                cuda._said("execute_async_v3")
                assert self.addresses.keys() == self.engine.tensors.keys()
                if "execute" in fake.refuse:
                    cuda.dead = "kill" in fake.refuse
                    self.engine.logger.log(ILogger.ERROR, "illegal memory access")
                    return False
                cuda.queue(stream, self._compute)
                return True

            def _compute(self) -> None:
                assert not self.busy, "two threads share a context"
                self.busy = True
                feeds = {name: self._seen(name).copy() for name in self.engine.inputs}
                results = self.engine.session.run(None, feeds)
                for output, result in zip(self.engine.session.get_outputs(), results, strict=True):
                    self._seen(output.name)[...] = result
                self.busy = False

            def _seen(self, name: str) -> np.ndarray:
                shape = self.get_tensor_shape(name)
                block = cuda.memory[self.addresses[name]]
                assert block.nbytes == 4 * np.prod(shape)
                return block.view(np.float32).reshape(shape)

        class Refitter:
            def __init__(self, engine: Engine, logger: ILogger) -> None:
                cuda._said("Refitter")
                self.logger = logger

            def get_missing_weights(self) -> list[str]:
                cuda._said("get_missing_weights")
                return [f"weight{index}" for index in range(7)] if "missing" in fake.refuse else []

            def refit_cuda_engine(self) -> bool:
                cuda._said("refit_cuda_engine")
                if "refit" in fake.refuse:
                    self.logger.log(ILogger.ERROR, "out of memory")
                return "refit" not in fake.refuse

        class OnnxParserRefitter:
            num_errors = 1

            def __init__(self, refitter: Refitter, logger: ILogger) -> None:
                cuda._said("OnnxParserRefitter")

            def get_error(self, index: int) -> Any:
                return SimpleNamespace(desc=lambda: "unsupported\nnode")

            def refit_from_bytes(self, model: bytes) -> bool:
                cuda._said("refit_from_bytes")
                fake.graphs.append(model)
                return not fake.refuse & {"weights", "missing"}

        self.ILogger, self.Runtime = ILogger, Runtime
        self.Refitter, self.OnnxParserRefitter = Refitter, OnnxParserRefitter
        self.SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="exclude", INCLUDE_REFIT="include")
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled")
