"""ONNX Runtime backend: one inference session a graph, opened when first used."""

import os
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import BackendUnavailable, BundleError
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

    def run(self, graph: str, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        session = self.session(graph)
        names = [tensor.name for tensor in self._bundle.manifest.graphs[graph].inputs]
        outputs = [tensor.name for tensor in self._bundle.manifest.graphs[graph].outputs]
        feeds = {name: np.ascontiguousarray(array) for name, array in zip(names, inputs, strict=True)}
        results: list[NDArray[np.float32]] = session.run(outputs, feeds)
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


def _options(provider: str) -> dict[str, str]:
    if provider != _PROVIDERS["cuda"]:
        return {}
    # TF32 keeps 10 bits of the flow's state, which then cannot be inverted. Processes that were launched together
    # take a GPU each.
    return {"use_tf32": "0", "device_id": os.environ.get("LOCAL_RANK", "0")}


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
