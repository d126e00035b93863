"""PyTorch backend: the bundled reference weights with constants folded, on any torch device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hflow_rt.choices import Precision
from hflow_rt.errors import BackendUnavailable
from hflow_rt.extras import needed
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.engines.engine import Calls, Engine, looped

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["TorchEngine", "open_engine"]


class TorchEngine(Engine):
    """Runs the same graphs that export writes, as torch modules, in float32."""

    precision: Precision = "fp32"

    def __init__(self, bundle: Bundle, modules: "dict[str, nn.Module]", device: "torch.device") -> None:
        super().__init__(bundle)
        self._modules, self._device = modules, device
        for module in modules.values():
            module.eval().to(device)

    @property
    def backend(self) -> str:
        return f"torch {self._device}"

    def close(self) -> None:
        self._modules.clear()

    def loop(self, calls: Calls) -> Iterator[Mapping[str, NDArray[np.float32]]]:
        import torch

        described = self._bundle.manifest.graphs[calls.graph]

        def placed(arrays: Mapping[str, NDArray[np.float32]]) -> "dict[str, torch.Tensor]":
            return {name: self._placed(array) for name, array in arrays.items()}

        def call(values: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
            with torch.inference_mode():
                outputs = self._modules[calls.graph](*[values[tensor.name] for tensor in described.inputs])
            return {tensor.name: output for tensor, output in zip(described.outputs, outputs, strict=True)}

        on_device = replace(calls, first=placed(calls.first), rows=map(placed, calls.rows))
        for outputs in looped(call, on_device):
            yield {name: output.cpu().numpy() for name, output in outputs.items()}

    def _placed(self, array: NDArray[np.float32]) -> "torch.Tensor":
        """On the device. Torch shares the memory and so wants it writable, which a memory-mapped array need not be."""
        import torch

        return torch.from_numpy(np.require(array, requirements=("C", "W"))).to(self._device)

    def run(self, graph: str, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        import torch

        with torch.inference_mode():
            outputs = self._modules[graph](*[self._placed(array) for array in inputs])
            return [output.cpu().numpy() for output in outputs]


def open_engine(bundle: Bundle, device: str) -> TorchEngine:
    """The engine on `device`; `auto` takes CUDA where it is. Raises `BackendUnavailable`."""
    with needed("torch", "the torch backend needs PyTorch: pip install 'hflow-rt[train]'"):
        import torch
    from hflow_rt.models.checkpoint import load_model

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            "torch finds no CUDA device here; install a CUDA build and driver, or use --device cpu"
        )
    if device == "cuda":
        # TF32 keeps 10 bits of the flow's state, which then cannot be inverted
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    modules = {name: spec.module for name, spec in load_model(bundle.model).graphs().items()}
    return TorchEngine(bundle, modules, torch.device(device))
