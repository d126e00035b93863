"""ONNX Runtime backend: one inference session a graph, opened when first used."""

import os
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np

from hflow_rt.errors import BackendUnavailable, BundleError
from hflow_rt.manifest import Graph
from hflow_rt.runtime.bundle import Bundle

__all__ = ["OnnxEngine", "open_engine"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxEngine:
    """Runs graphs of a bundle on one execution provider. Safe to share between threads."""

    def __init__(self, bundle: Bundle, provider: str, runtime: Any) -> None:
        self._bundle, self._provider, self._runtime = bundle, provider, runtime
        self._sessions: dict[str, Any] = {}
        self._lock = Lock()

    @property
    def backend(self) -> str:
        return f"onnxruntime {self._provider}"

    @property
    def graphs(self) -> tuple[str, ...]:
        return tuple(self._bundle.manifest.graphs)

    @property
    def verified(self) -> bool:
        return self._bundle.manifest.verified

    @property
    def tensors(self) -> str | None:
        return f"cuda:{_device_id()}" if self._provider == _PROVIDERS["cuda"] else None

    def close(self) -> None:
        with self._lock:
            self._sessions.clear()

    def run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        session, described = self.session(graph), self._bundle.manifest.graphs[graph]
        if not isinstance(inputs[0], np.ndarray):
            return _run_tensors(session, described, inputs)
        names = [tensor.name for tensor in described.inputs]
        outputs = [tensor.name for tensor in described.outputs]
        feeds = {name: np.ascontiguousarray(array) for name, array in zip(names, inputs, strict=True)}
        results: list[Any] = session.run(outputs, feeds)
        return results

    def session(self, graph: str) -> Any:
        """The session of a graph on exactly the provider that was asked for."""
        with self._lock:
            if graph not in self._sessions:
                path = self._bundle.graph(graph)
                options = self._runtime.SessionOptions()
                options.log_severity_level = 4  # ours is the one line that explains a failure
                try:
                    found = self._runtime.InferenceSession(
                        str(path), options, providers=[(self._provider, _options(self._provider))]
                    )
                except Exception as error:  # ONNX Runtime raises a dozen classes of its own, none public
                    reason = str(error).splitlines()[0]
                    raise BundleError(
                        f"ONNX Runtime {self._runtime.__version__} cannot open {path}: {reason}"
                    ) from error
                # ONNX Runtime falls back to the CPU without an exception
                if found.get_providers()[0] != self._provider:
                    raise BackendUnavailable(
                        f"{self._provider} does not start here (ONNX Runtime fell back to {found.get_providers()[0]});"
                        " install hflow-rt[gpu] and a CUDA driver, or use --device cpu"
                    )
                self._sessions[graph] = found
            return self._sessions[graph]


def _run_tensors(session: Any, graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    """Run on torch tensors where they are: ONNX Runtime reads and writes their memory."""
    import torch

    device = inputs[0].device
    place = {"device_type": device.type, "device_id": device.index or 0, "element_type": np.float32}
    binding = session.io_binding()
    whole = [tensor.contiguous() for tensor in inputs]
    results = [torch.empty((len(inputs[0]), *tensor.shape), device=device) for tensor in graph.outputs]
    for bind, described, tensors in (
        (binding.bind_input, graph.inputs, whole),
        (binding.bind_output, graph.outputs, results),
    ):
        for tensor, given in zip(described, tensors, strict=True):
            bind(name=tensor.name, shape=tuple(given.shape), buffer_ptr=given.data_ptr(), **place)
    if device.type == "cuda":  # ONNX Runtime has a stream of its own, and waits for that one by itself
        torch.cuda.current_stream(device).synchronize()
    session.run_with_iobinding(binding)
    return results


def _device_id() -> str:
    return os.environ.get("LOCAL_RANK", "0")


def _options(provider: str) -> dict[str, str]:
    if provider != _PROVIDERS["cuda"]:
        return {}
    # TF32 keeps 10 bits of the flow's state, which then cannot be inverted. Processes that were launched together
    # take a GPU each.
    return {"use_tf32": "0", "device_id": _device_id()}


def open_engine(bundle: Bundle, device: str) -> OnnxEngine:
    """The engine on `device`; `auto` takes CUDA where it works. Raises `BackendUnavailable`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            "the onnx backend needs ONNX Runtime: pip install 'hflow-rt[cpu]' (or [gpu])"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendUnavailable(
            "onnxruntime is damaged (two of its packages overwrote each other); see 'hflow-rt doctor'"
        )
    available: list[str] = onnxruntime.get_available_providers()  # type: ignore[attr-defined]
    if device == "auto":
        if _PROVIDERS["cuda"] in available:
            engine = OnnxEngine(bundle, _PROVIDERS["cuda"], onnxruntime)
            try:
                engine.session(next(iter(bundle.manifest.graphs)))
                return engine
            except BackendUnavailable:
                pass  # `auto` means: the best that works; `backend` tells which it is
        device = "cpu"
    provider = _PROVIDERS[device]
    if provider not in available:
        raise BackendUnavailable(
            f"{provider} is not in this ONNX Runtime; pip install 'hflow-rt[gpu]' or use --device cpu"
        )
    return OnnxEngine(bundle, provider, onnxruntime)
