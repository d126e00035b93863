"""What a backend is, and which there are."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from hflow_rt.errors import BackendUnavailable

__all__ = ["BACKENDS", "DEVICES", "ONNX_DEVICES", "Engine", "check_backend"]

# name -> (module with `open_engine`, what it is); also what the command line offers
BACKENDS = {
    "onnx": ("hflow_rt.runtime.engines.onnx", "ONNX Runtime on the exported graphs"),
    "trt": ("hflow_rt.runtime.engines.tensorrt", "TensorRT, or TensorRT for RTX, on the engines built for this GPU"),
    "torch": ("hflow_rt.runtime.engines.torch", "PyTorch on the bundled weights, constants folded"),
}
DEVICES = ("auto", "cpu", "cuda")
# of the onnx backend only, for who asks for them: ONNX Runtime hands the graph to TensorRT, or to TensorRT for RTX
ONNX_DEVICES = ("tensorrt", "rtx")


class Engine(Protocol):
    """What a backend implements: run one graph on float32 arrays in the graph's order."""

    @property
    def backend(self) -> str:
        """What really runs, e.g. `onnxruntime CPUExecutionProvider`."""

    @property
    def graphs(self) -> Collection[str]:
        """What it can run."""

    @property
    def verified(self) -> bool:
        """Whether this very engine was proved to be the model, as far as the bundle knows."""

    @property
    def tensors(self) -> str | None:
        """The device, such as `cuda:0`, whose torch tensors `run` takes and yields without a copy through the host."""

    def run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """Outputs of `graph`, of the kind of the inputs. Raises `BundleError` where the bundle lacks it."""

    def loop(
        self,
        graph: str,
        first: Mapping[str, Any],
        rows: Iterable[Mapping[str, Any]],
        carry: Mapping[str, str],
        every: Collection[str],
    ) -> Iterator[Mapping[str, Any]]:
        """Calls of `graph`, one for each of `rows`, as `looped` says, on at most one batch of images."""

    def close(self) -> None:
        """Give back what it holds on a GPU. Once closed it does not run again."""


def check_backend(backend: str, device: str) -> None:
    """Raise `BackendUnavailable` for names that nobody knows, before anything is read."""
    if backend not in BACKENDS:
        raise BackendUnavailable(f"unknown backend '{backend}'; known: {', '.join(BACKENDS)}")
    if device in ONNX_DEVICES and backend != "onnx":
        raise BackendUnavailable(f"device '{device}' is for the onnx backend, not for {backend}; use --device cuda")
    if device not in (*DEVICES, *ONNX_DEVICES):
        raise BackendUnavailable(f"unknown device '{device}'; known: {', '.join(DEVICES)}")
