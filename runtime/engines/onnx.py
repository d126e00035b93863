"""ONNX Runtime backend: one inference session a graph, opened when first used.

With a CUDA graph, ONNX Runtime records the work of a graph at one batch size and replays it. What is recorded reads and
writes fixed addresses, so each batch size has buffers of its own (a `Lane`), and one thread runs at a time.
"""

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from hflow_rt.errors import BackendUnavailable, BundleError
from hflow_rt.extras import needed
from hflow_rt.manifest import Graph
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.engines.cpu import (
    Settings,
    TunedGraph,
    cores,
    default,
    piece_of,
    pieces_of,
    shared_out,
    threads,
    tuned_graph,
)
from hflow_rt.runtime.engines.engine import Calls, Engine

if TYPE_CHECKING:
    from hflow_rt.runtime.engines.cuda import Cuda
    from hflow_rt.runtime.engines.device_buffers import Lane

__all__ = ["OnnxEngine", "open_engine"]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
_INSTALL = {
    "cpu": "pip install 'hflow-rt[cpu]'",
    "cuda": "pip install 'hflow-rt[gpu]' or use --device cpu",
    # its library is linked with libnvinfer.so.10
    "tensorrt": "pip install 'hflow-rt[gpu]' 'tensorrt<11', or use --device cuda",
    "rtx": "no package of ONNX Runtime has it, build one that does, or use --backend trt --device cuda",
}
_PREFIX = {"tensorrt": "trt", "rtx": "nv"}  # of a provider's own options
_LIKELY = 16  # batch
_RECORDED = 8  # batch sizes per graph: ONNX Runtime keeps what it recorded, and the memory for it, to the end
_GRAPH_ID, _NO_GRAPH = "gpu_graph_id", "-1"


class OnnxEngine(Engine):
    """Runs graphs of a bundle on one execution provider. Safe to share between threads.

    device: a key of `_PROVIDERS`. cuda: where given, its work is replayed as CUDA graphs. settings: how every graph
    runs on the CPU, instead of what is known of each.
    """

    def __init__(
        self, bundle: Bundle, device: str, runtime: Any, cuda: "Cuda | None" = None, settings: Settings | None = None
    ) -> None:
        super().__init__(bundle)
        self._device, self._runtime, self._given = device, runtime, settings
        self.tensors = None if device == "cpu" else f"cuda:{_device_id()}"
        self.side_by_side = device == "cpu" and cores() > 1
        self._provider = _PROVIDERS[device]
        self._sessions: dict[tuple[str, bool], Any] = {}
        self._settings: dict[str, Settings] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock, self._running = Lock(), Lock()
        self._cuda = cuda
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._recorded = 0
        # also at exit: buffers must go before the driver does
        self._released = weakref.finalize(self, _release, cuda, self._lanes)

    @property
    def backend(self) -> str:
        return f"onnxruntime {self._provider}{' with a CUDA graph' if self._cuda is not None else ''}"

    def close(self) -> None:
        with self._running, self._lock:
            _release(self._cuda, self._lanes)
            self._sessions.clear()
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    def run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        if self._device == "cpu" and isinstance(inputs[0], np.ndarray):
            return self._run_on_cpu(graph, inputs)
        session, described = self.session(graph), self._bundle.manifest.graphs[graph]
        if self._cuda is not None:
            with self._running:
                return self._replay(self._cuda, session, graph, inputs)
        return self._run(session, described, inputs)

    def loop(self, calls: Calls) -> Iterator[Mapping[str, Any]]:
        if not calls.on_host:
            return super().loop(calls)
        return self._by_bindings(calls) if self._cuda is None else self._replayed(self._cuda, calls)

    def _by_bindings(self, calls: Calls, options: Any = None) -> Iterator[Mapping[str, Any]]:
        device = ("cpu", 0) if self._device == "cpu" else ("cuda", int(_device_id()))
        graph = self._bundle.manifest.graphs[calls.graph]
        parts = self.settings(calls.graph).parts(calls.batch) if self._device == "cpu" else 1
        session = self.session(calls.graph, alone=parts > 1)
        pieces = pieces_of(calls.batch, parts)

        def shares(values: Mapping[str, Any]) -> list[dict[str, Any]]:
            return [{name: piece_of(array, piece) for name, array in values.items()} for piece in pieces]

        bound = [
            _Bindings(self._runtime, session, graph, device, first, calls.carry, options)
            for first in shares(calls.first)
        ]
        run: Any = map if parts == 1 else self._workers().map
        under_way = False
        for row in calls.rows:
            if under_way:
                yield _joined(bound, calls.every)
            list(run(_Bindings.call, bound, shares(row)))
            under_way = True
        if under_way:
            yield _joined(bound, [tensor.name for tensor in graph.outputs])

    def _replayed(self, cuda: "Cuda", calls: Calls) -> Iterator[Mapping[str, Any]]:
        """By the CUDA graph of this batch size where it has one."""
        with self._running, cuda.current():
            lane = self._lane(cuda, calls.graph, calls.batch)
            if lane is None:
                yield from self._by_bindings(calls, self._options(_NO_GRAPH))
            else:
                with self._dropped_on_failure(calls.graph, calls.batch):
                    yield from lane.loop(calls)

    def _run_on_cpu(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        if graph not in self.graphs:
            self._bundle.graph(graph)  # says which there are
        described = self._bundle.manifest.graphs[graph]
        parts = self.settings(graph).parts(max(len(array) for array in inputs))
        if parts == 1:
            # what is left of a batch is not worth another session
            alone = (graph, True) in self._sessions and (graph, False) not in self._sessions
            return self._run(self.session(graph, alone), described, inputs)
        session = self.session(graph, alone=True)
        return shared_out(lambda piece: self._run(session, described, piece), inputs, parts, self._workers())

    def _workers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(cores(), thread_name_prefix="images")
            return self._pool

    def settings(self, graph: str) -> Settings:
        """How a graph runs on the CPU: as `hflow-rt tune` found it to run fastest here, or as most do."""
        if graph not in self._settings:
            self._settings[graph] = self._given or self._place(graph).read() or default()
        return self._settings[graph]

    def _place(self, graph: str) -> TunedGraph:
        return tuned_graph(self._bundle, graph, self._runtime.__version__)

    def _run(self, session: Any, described: Graph, inputs: Sequence[Any], options: Any = None) -> list[Any]:
        if not isinstance(inputs[0], np.ndarray):
            return _run_tensors(session, described, inputs, options)
        names = [tensor.name for tensor in described.inputs]
        outputs = [tensor.name for tensor in described.outputs]
        feeds = {name: np.ascontiguousarray(array) for name, array in zip(names, inputs, strict=True)}
        results: list[Any] = session.run(outputs, feeds, options)
        return results

    def _replay(self, cuda: "Cuda", session: Any, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """Run by the CUDA graph of this batch size, which the first run records; some sizes have none."""
        described, batch = self._bundle.manifest.graphs[graph], max(len(array) for array in inputs)
        with cuda.current():
            lane = self._lane(cuda, graph, batch)
            if lane is not None:
                with self._dropped_on_failure(graph, batch):
                    return lane.run(inputs)
        return self._run(session, described, inputs, self._options(_NO_GRAPH))

    def _lane(self, cuda: "Cuda", graph: str, batch: int) -> "Lane | None":
        """The buffers of this batch size; None where too many sizes were recorded already."""
        from hflow_rt.runtime.engines.device_buffers import Lane

        place = graph, batch
        if place not in self._lanes:
            if sum(name == graph for name, _ in self._lanes) >= _RECORDED:
                return None
            described = self._bundle.manifest.graphs[graph]
            self._recorded += 1  # a number is never used again: it stands for addresses
            bound = _Bound(self.session(graph), described, batch, self._options(str(self._recorded)), cuda)
            self._lanes[place] = Lane(cuda, bound, described.inputs, described.outputs, batch, False, ())
        return self._lanes[place]

    @contextlib.contextmanager
    def _dropped_on_failure(self, graph: str, batch: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._lanes.pop((graph, batch)).close()
            raise

    def _options(self, recording: str) -> Any:
        options = self._runtime.RunOptions()
        options.add_run_config_entry(_GRAPH_ID, recording)
        return options

    def session(self, graph: str, alone: bool = False) -> Any:
        """The session of a graph on exactly the provider that was asked for; alone: of calls of one thread each."""
        with self._lock:
            if (graph, alone) not in self._sessions:
                path = self._bundle.graph(graph)
                settings = self.settings(graph) if self._device == "cpu" else Settings(threads())
                options = settings.options(self._runtime, 1 if alone else settings.threads)
                ready = self._place(graph).optimised if self._device == "cpu" and self._given is None else None
                if ready is not None:
                    path, options.graph_optimization_level = ready, self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
                try:
                    found = self._runtime.InferenceSession(
                        str(path), options, providers=self._providers(self._bundle.manifest.graphs[graph])
                    )
                except Exception as error:  # ONNX Runtime raises a dozen classes of its own, none public
                    reason = str(error).splitlines()[0]
                    again = "; measure again with 'hflow-rt tune'" if ready is not None else ""
                    raise BundleError(
                        f"ONNX Runtime {self._runtime.__version__} cannot open {path}: {reason}{again}"
                    ) from error
                # ONNX Runtime falls back to the CPU without an exception
                if found.get_providers()[0] != self._provider:
                    raise BackendUnavailable(
                        f"{self._provider} does not start here (ONNX Runtime fell back to {found.get_providers()[0]});"
                        f" it needs a CUDA driver, and: {_INSTALL[self._device]}"
                    )
                self._sessions[graph, alone] = found
            return self._sessions[graph, alone]

    def _providers(self, graph: Graph) -> list[tuple[str, dict[str, str]]]:
        """The provider and its options; after one of TensorRT's, CUDA takes what that leaves over."""
        if self._device == "cpu":
            return [(self._provider, {})]
        # processes that were launched together take a GPU each
        place = {"device_id": _device_id()}
        cuda = place | {
            "use_tf32": "0",  # it keeps 10 bits of the flow's state, which then cannot be inverted
            "cudnn_conv_algo_search": "HEURISTIC",  # else every new batch size times every algorithm of every layer
            "arena_extend_strategy": "kSameAsRequested",  # else memory is taken in powers of two
        }
        if self._device == "cuda":
            return [(self._provider, cuda | ({} if self._cuda is None else {"enable_cuda_graph": "1"}))]
        shapes = {}
        for which, size in (("min", graph.batch[0]), ("opt", min(_LIKELY, graph.batch[1])), ("max", graph.batch[1])):
            tensors = [f"{tensor.name}:{'x'.join(map(str, tensor.batched(size)))}" for tensor in graph.inputs]
            shapes[f"{_PREFIX[self._device]}_profile_{which}_shapes"] = ",".join(tensors)
        available = self._runtime.get_available_providers()
        rest = [(_PROVIDERS["cuda"], cuda)] if _PROVIDERS["cuda"] in available else []
        return [(self._provider, place | shapes), *rest]


class _Bindings:
    """A session whose outputs become its inputs without leaving the device: two buffers of each take turns.

    first, carry: as in `Calls`. options: of every run.
    """

    def __init__(
        self,
        runtime: Any,
        session: Any,
        graph: Graph,
        device: tuple[str, int],
        first: Mapping[str, Any],
        carry: Mapping[str, str],
        options: Any,
    ) -> None:
        self._value, self._session, self._device = runtime.OrtValue, session, device
        self._carry, self._options = carry, options
        self._binding = session.io_binding()
        batch = max(len(array) for array in first.values())
        self._outputs = {
            tensor.name: self._value.ortvalue_from_shape_and_type(list(tensor.batched(batch)), np.float32, *device)
            for tensor in graph.outputs
        }
        # a copy, because it is written to when its turn comes
        self._carried = {entered: self._placed(first[entered].copy()) for entered in carry.values()}
        for name, array in first.items():
            if name not in self._carried:
                self._binding.bind_ortvalue_input(name, self._placed(array))
        self._called = False

    def call(self, row: Mapping[str, Any]) -> None:
        """Run on `row` and on what the call before left."""
        if self._called:
            for left, entered in self._carry.items():
                self._carried[entered], self._outputs[left] = self._outputs[left], self._carried[entered]
        for name, given in (self._carried | {name: self._placed(array) for name, array in row.items()}).items():
            self._binding.bind_ortvalue_input(name, given)
        for name, room in self._outputs.items():
            self._binding.bind_ortvalue_output(name, room)
        self._session.run_with_iobinding(self._binding, self._options)
        self._called = True

    def read(self, name: str) -> Any:
        """An output of the last call, until the next."""
        return self._outputs[name].numpy()

    def _placed(self, array: Any) -> Any:
        return self._value.ortvalue_from_numpy(np.ascontiguousarray(array), *self._device)


def _joined(bound: Sequence[_Bindings], names: Iterable[str]) -> dict[str, Any]:
    """A copy of what the last call left, of all pieces of the batch."""
    return {name: np.concatenate([piece.read(name) for piece in bound]) for name in names}


class _Bound:
    """A session bound to fixed addresses at one batch size; to a `Lane` it is what a context of TensorRT's is."""

    def __init__(self, session: Any, graph: Graph, batch: int, options: Any, cuda: "Cuda") -> None:
        self._session, self._batch, self._options, self._cuda = session, batch, options, cuda
        self._binding = session.io_binding()
        self._inputs = {tensor.name for tensor in graph.inputs}
        self._shapes = {tensor.name: tensor.batched(batch) for tensor in (*graph.inputs, *graph.outputs)}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
        place = {"device_type": "cuda", "device_id": int(_device_id()), "element_type": np.float32}
        bind(name=name, shape=self.get_tensor_shape(name), buffer_ptr=address, **place)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Run and wait: ONNX Runtime has a stream of its own, so nothing may be under way on this one."""
        self._cuda.synchronize(stream)
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime raises a dozen classes of its own, none public
            reason = str(error).splitlines()[0]
            raise BackendUnavailable(
                f"ONNX Runtime failed at batch {self._batch}: {reason}; try without --cuda-graph"
            ) from error
        return True


def _release(cuda: "Cuda | None", lanes: "dict[tuple[str, int], Lane]") -> None:
    if cuda is not None and lanes:
        with contextlib.suppress(BackendUnavailable), cuda.current():
            while lanes:
                lanes.popitem()[1].close()


def _run_tensors(session: Any, graph: Graph, inputs: Sequence[Any], options: Any = None) -> list[Any]:
    """Run on torch tensors where they are: ONNX Runtime reads and writes their memory."""
    import torch

    device = inputs[0].device
    place = {"device_type": device.type, "device_id": device.index or 0, "element_type": np.float32}
    binding = session.io_binding()
    whole = [tensor.contiguous() for tensor in inputs]
    batch = max(len(tensor) for tensor in inputs)
    results = [torch.empty(tensor.batched(batch), device=device) for tensor in graph.outputs]
    for bind, described, tensors in (
        (binding.bind_input, graph.inputs, whole),
        (binding.bind_output, graph.outputs, results),
    ):
        for tensor, given in zip(described, tensors, strict=True):
            bind(name=tensor.name, shape=tuple(given.shape), buffer_ptr=given.data_ptr(), **place)
    if device.type == "cuda":  # ONNX Runtime has a stream of its own, and waits for that one by itself
        torch.cuda.current_stream(device).synchronize()
    session.run_with_iobinding(binding, options)
    return results


def _device_id() -> str:
    return os.environ.get("LOCAL_RANK", "0")


def open_engine(bundle: Bundle, device: str, cuda_graph: bool = False) -> OnnxEngine:
    """The engine on `device`; `auto` takes CUDA where it works. Raises `BackendUnavailable`.

    cuda_graph: replay the work on CUDA, which `auto` then is.
    """
    with needed("onnxruntime", "the onnx backend needs ONNX Runtime: pip install 'hflow-rt[cpu]' (or [gpu])"):
        import onnxruntime
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendUnavailable(
            "onnxruntime is damaged (two of its packages overwrote each other); see 'hflow-rt doctor'"
        )
    available: list[str] = onnxruntime.get_available_providers()  # type: ignore[attr-defined]
    if cuda_graph:
        device = "cuda" if device == "auto" else device
        if device != "cuda":
            raise BackendUnavailable(f"--cuda-graph is for --device cuda, not {device}; omit it")
    if device == "auto":
        if _PROVIDERS["cuda"] in available:
            engine = OnnxEngine(bundle, "cuda", onnxruntime)
            try:
                engine.session(next(iter(bundle.manifest.graphs)))
                return engine
            except BackendUnavailable:
                pass  # `auto` means: the best that works; `backend` tells which it is
        device = "cpu"
    if _PROVIDERS[device] not in available:
        raise BackendUnavailable(f"{_PROVIDERS[device]} is not in this ONNX Runtime; {_INSTALL[device]}")
    if device in _PREFIX and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        raise BackendUnavailable(
            f"{_PROVIDERS[device]} would compute in TF32, in which a flow cannot be inverted, and has no option against"
            " it; set NVIDIA_TF32_OVERRIDE=0 in the environment"
        )
    if not cuda_graph:
        return OnnxEngine(bundle, device, onnxruntime)
    from hflow_rt.runtime.engines.cuda import Cuda, chosen_gpu

    gpu = chosen_gpu()
    if gpu is None:
        raise BackendUnavailable("--cuda-graph needs an NVIDIA GPU and none was found here (see 'hflow-rt doctor')")
    return OnnxEngine(bundle, device, onnxruntime, Cuda(gpu))
