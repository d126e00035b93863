"""Which backends and devices there are."""

from hflow_rt.errors import BackendUnavailable

__all__ = ["BACKENDS", "DEVICES", "ONNX_DEVICES", "check_backend"]

# name -> (module with `open_engine`, what it is); also what the command line offers
BACKENDS = {
    "onnx": ("hflow_rt.runtime.engines.onnx", "ONNX Runtime on the exported graphs"),
    "trt": ("hflow_rt.runtime.engines.tensorrt", "TensorRT, or TensorRT for RTX, on the engines built for this GPU"),
    "torch": ("hflow_rt.runtime.engines.torch", "PyTorch on the bundled weights, constants folded"),
}
DEVICES = ("auto", "cpu", "cuda")
# of the onnx backend only, for who asks for them: ONNX Runtime hands the graph to TensorRT, or to TensorRT for RTX
ONNX_DEVICES = ("tensorrt", "rtx")


def check_backend(backend: str, device: str) -> None:
    """Raise `BackendUnavailable` for names that nobody knows, before anything is read."""
    if backend not in BACKENDS:
        raise BackendUnavailable(f"unknown backend '{backend}'; known: {', '.join(BACKENDS)}")
    if device in ONNX_DEVICES and backend != "onnx":
        raise BackendUnavailable(f"device '{device}' is for the onnx backend, not for {backend}; use --device cuda")
    if device not in (*DEVICES, *ONNX_DEVICES):
        raise BackendUnavailable(f"unknown device '{device}'; known: {', '.join(DEVICES)}")
