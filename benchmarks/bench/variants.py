"""What is measured: every way there is to run a bundle, from one table.

The first is the model as it was trained, which recomputes gains, exponentials and inverses in every call. A variant
opens in a process of its own, so that its memory, threads and allocator are its own too.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from hflow_rt.choices import Routes
from hflow_rt.errors import BackendUnavailable
from hflow_rt.extras import needed
from hflow_rt.manifest import MODEL, Loop, Manifest, routes_of
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.drawing import Drawing
from hflow_rt.runtime.engines.engine import Calls, called, looped
from hflow_rt.runtime.loops import drawn_by_call, follow, row_of

__all__ = [
    "BASELINE",
    "REFERENCE",
    "ROOFS",
    "ROOF_OPERATIONS",
    "VARIANTS",
    "Running",
    "Variant",
    "cases_of",
    "files_of",
    "loop_of",
    "opened",
]

Array = NDArray[Any]
BASELINE = "torch eager, unfolded"
REFERENCE = "torch float64"  # what errors are taken against; never timed
# by device: a convolution large enough to show what the device can do, whatever it is called with
ROOFS = {"cpu": "one large convolution", "cuda": "one large convolution, CUDA"}
_ROOF_SHAPE = {"cpu": (1, 256, 64, 64), "cuda": (32, 256, 64, 64)}
ROOF_OPERATIONS = {
    device: 2.0 * batch * channels * channels * 9 * height * width
    for device, (batch, channels, height, width) in _ROOF_SHAPE.items()
}


class Running(Protocol):
    """An opened variant."""

    backend: str
    bundle: Bundle

    def place(self, arrays: Mapping[str, Array]) -> Any:
        """Inputs by name, where the variant takes them from."""

    def call(self, case: str, inputs: Any) -> Any:
        """Run a graph, or a route that is a loop, once and wait until the result is there."""

    def launch(self, case: str, inputs: Any) -> Any:
        """Run once and return as soon as the work is queued."""

    def host(self, outputs: Any) -> list[Array]:
        """Outputs as arrays, in the order of the graph."""


@dataclass(frozen=True)
class Variant:
    """One way to run. `environment` is set before its process starts; `device` is where it computes."""

    open: Callable[[Bundle], Running]
    device: str
    files: str = MODEL
    environment: Mapping[str, str] = field(default_factory=dict)


class _Torch:
    """The torch model: with constants folded or not, and with torch's own means of running faster."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        *,
        folded: bool = True,
        double: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
        kernels: bool = False,
        replayed: bool = False,
    ) -> None:
        with needed("torch", "needs PyTorch: pip install 'hflow-rt[train]'"):
            import torch
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable("torch finds no CUDA device")
        from hflow_rt.kernels.dispatch import using
        from hflow_rt.models.checkpoint import load_model

        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._torch, self._device, self._replayed = torch, torch.device(device), replayed
        self._mode = using("triton" if kernels else "reference")
        self._mode.__enter__()  # for the life of the process
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._dtype = torch.float64 if double else torch.float32
        self.bundle = bundle
        modules: dict[str, Any] = {}
        for name, spec in load_model(bundle.model).eval().graphs().items():
            module = (spec.module if folded else spec.reference).eval().to(self._device, self._dtype)
            if channels_last:
                module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            modules[name] = torch.compile(module, dynamic=False) if compiled else module
        self._modules = modules
        self._drawing = Drawing(bundle)
        self.backend = f"torch {torch.__version__} {device}"
        self._recorded: dict[Any, Any] = {}

    def _run(self, case: str, inputs: Mapping[str, Any]) -> Any:
        loop = loop_of(self.bundle.manifest, case)
        if loop is None:
            return self._module(case, [inputs[tensor.name] for tensor in self.bundle.manifest.graphs[case].inputs])
        start, step = (self.bundle.manifest.graphs[name] for name in loop.graphs)
        schedule, drawn = self.place(self._drawing.table(loop.schedule)), drawn_by_call(step.inputs)

        def calls(first: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
            rows = (row_of(schedule, drawn, inputs, index) for index in range(loop.steps))
            every = Calls(loop.step, first, rows, loop.carry, loop.every.keys())
            return looped(called(self._module, loop.step, step), every)

        begun = called(self._module, loop.start, start)(dict(inputs))
        return [*follow(loop, inputs, begun, calls, self.bundle.manifest.latent_shapes).values()]

    def _module(self, graph: str, inputs: list[Any]) -> Any:
        return self._modules[graph](*inputs)

    def place(self, arrays: Mapping[str, Array]) -> Any:
        def placed(array: Array) -> Any:
            tensor = self._torch.from_numpy(array).to(self._device, self._dtype)
            return tensor.contiguous(memory_format=self._format) if tensor.dim() == 4 else tensor

        return {name: placed(array) for name, array in arrays.items()}

    def launch(self, graph: str, inputs: Any) -> Any:
        with self._torch.inference_mode():
            return self._replay(graph, inputs) if self._replayed else self._run(graph, inputs)

    def call(self, graph: str, inputs: Any) -> Any:
        outputs = self.launch(graph, inputs)
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()
        return outputs

    def host(self, outputs: Any) -> list[Array]:
        return [output.cpu().numpy() for output in outputs]

    def _replay(self, graph: str, inputs: Any) -> Any:
        """As one CUDA graph a batch size, recorded when first seen."""
        torch = self._torch
        key = graph, len(next(iter(inputs.values())))
        if key not in self._recorded:
            held = {name: tensor.clone() for name, tensor in inputs.items()}
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._run(graph, held)
            torch.cuda.current_stream().wait_stream(stream)
            recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recording):
                outputs = self._run(graph, held)
            self._recorded[key] = recording, held, outputs
        recording, held, outputs = self._recorded[key]
        for name, tensor in inputs.items():
            held[name].copy_(tensor)
        recording.replay()
        return outputs


class _Engine:
    """A backend of the runtime, as a session runs it."""

    def __init__(self, bundle: Bundle, backend: str, device: str, **options: Any) -> None:
        from hflow_rt.runtime.session import open_bundle

        self._session = open_bundle(bundle, backend, device, **options)
        self.bundle = bundle
        self.backend = self._session.backend
        if self._session.precision == "mixed":
            self.backend += ", mixed"

    def place(self, arrays: Mapping[str, Array]) -> Any:
        where = self._session.tensors
        if where is None:
            return dict(arrays)
        import torch

        return {name: torch.from_numpy(array).to(where) for name, array in arrays.items()}

    def launch(self, case: str, inputs: Any) -> Any:
        run = self._session.run_graph if case in self.bundle.manifest.graphs else self._session.run
        return run(case, inputs)  # type: ignore[arg-type]

    def call(self, graph: str, inputs: Any) -> Any:
        outputs = self.launch(graph, inputs)
        if self._session.tensors is not None:
            import torch

            torch.cuda.synchronize()
        return outputs

    def host(self, outputs: Any) -> list[Array]:
        return [value.cpu().numpy() if hasattr(value, "cpu") else value for value in outputs.values()]


class _Roof:
    """A float32 convolution and a copy, for what the machine reaches."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        import torch

        torch.backends.cudnn.allow_tf32 = False
        self.backend, self.bundle, self._torch, self._device = f"torch {device}", bundle, torch, device
        channels = _ROOF_SHAPE[device][1]
        self._convolution = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device)
        self._input = torch.randn(_ROOF_SHAPE[device], device=device)

    def place(self, arrays: Mapping[str, Array]) -> Any:
        return self._input

    def launch(self, graph: str, inputs: Any) -> Any:
        with self._torch.inference_mode():
            return self._convolution(inputs)

    def call(self, graph: str, inputs: Any) -> Any:
        outputs = self.launch(graph, inputs)
        if self._device == "cuda":
            self._torch.cuda.synchronize()
        return outputs

    def host(self, outputs: Any) -> list[Array]:
        return [outputs.cpu().numpy()]

    def bandwidth(self) -> float:
        """Bytes read and written a second by a copy too large for any cache."""
        source = self._torch.ones(2**26, device=self._device)
        target = self._torch.empty_like(source)
        best = math.inf
        for _ in range(5):
            started = time.perf_counter()
            target.copy_(source)
            if self._device == "cuda":
                self._torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return 2 * source.nbytes / best


def _torch(**options: Any) -> Callable[[Bundle], Running]:
    return lambda bundle: _Torch(bundle, **options)


def _engine(backend: str, device: str, **options: Any) -> Callable[[Bundle], Running]:
    return lambda bundle: _Engine(bundle, backend, device, **options)


# glibc hands large blocks back to the system at every call and takes page faults for them again: keep them instead
_KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

VARIANTS: dict[str, Variant] = {
    BASELINE: Variant(_torch(folded=False), "cpu"),
    "torch eager, unfolded, memory kept": Variant(_torch(folded=False), "cpu", environment=_KEEP),
    "torch eager, folded": Variant(_torch(), "cpu"),
    "torch eager, folded, memory kept": Variant(_torch(), "cpu", environment=_KEEP),
    "torch channels-last, memory kept": Variant(_torch(channels_last=True), "cpu", environment=_KEEP),
    "torch.compile": Variant(_torch(compiled=True), "cpu"),
    "torch.compile, memory kept": Variant(_torch(compiled=True), "cpu", environment=_KEEP),
    "onnx": Variant(_engine("onnx", "cpu"), "cpu", "graphs"),
    "torch eager, unfolded, CUDA": Variant(_torch(device="cuda", folded=False), "cuda"),
    "torch eager, folded, CUDA": Variant(_torch(device="cuda"), "cuda"),
    "torch channels-last, CUDA": Variant(_torch(device="cuda", channels_last=True), "cuda"),
    "torch.compile, CUDA": Variant(_torch(device="cuda", compiled=True), "cuda"),
    "torch kernels, CUDA": Variant(_torch(device="cuda", kernels=True), "cuda"),
    "torch kernels, CUDA graph": Variant(_torch(device="cuda", kernels=True, replayed=True), "cuda"),
    "onnx, CUDA": Variant(_engine("onnx", "cuda"), "cuda", "graphs"),
    "onnx, CUDA graph": Variant(_engine("onnx", "cuda", cuda_graph=True), "cuda", "graphs"),
    "onnx, TensorRT provider": Variant(_engine("onnx", "tensorrt"), "cuda", "graphs"),
    "trt": Variant(_engine("trt", "cuda"), "cuda", "plans"),
    "trt, no CUDA graph": Variant(_engine("trt", "cuda", cuda_graph=False), "cuda", "plans"),
}
# what figures are read against
_MEASURES = {
    REFERENCE: Variant(_torch(double=True, folded=False), "cpu"),
    **{name: Variant(partial(_Roof, device=device), device) for device, name in ROOFS.items()},
}


def opened(name: str) -> Variant:
    """The variant, or what stands behind the others, called `name`."""
    return VARIANTS.get(name) or _MEASURES[name]


def cases_of(manifest: Manifest, routes: Routes) -> list[str]:
    """What there is to measure: the graphs that routes need, for both all there are, and routes that are loops."""
    loops = [route for route in routes_of(routes) if loop_of(manifest, route) is not None]
    return [*manifest.graphs_for(routes), *loops]


def loop_of(manifest: Manifest, case: str) -> Loop | None:
    """The loop that is called like a case; a graph goes first."""
    found = None if case in manifest.graphs else manifest.routes.get(case)  # type: ignore[call-overload]
    return found if isinstance(found, Loop) else None


def files_of(variant: Variant, bundle: Path, manifest: Manifest, case: str) -> int:
    """Bytes on disk that the variant reads to run `case`."""
    loop = loop_of(manifest, case)
    graphs = (case,) if loop is None else loop.graphs
    if variant.files == MODEL:
        names = {MODEL}
    elif variant.files == "plans":
        newest = list(manifest.engines.values())[-1:]
        names = {engines.plans[name].file for engines in newest for name in graphs if name in engines.plans}
    else:
        names = {file for name in graphs for file in manifest.graphs[name].files}
    return sum(os.path.getsize(bundle / name) for name in names)
