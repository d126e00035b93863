"""One way to run a bundle, whatever computes it: `load(path, backend).forward / inverse / sample`."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hflow_rt.conditions import Choices, check_told, in_turn, of_option
from hflow_rt.errors import BackendUnavailable, BundleError, DataError, NoInverse
from hflow_rt.limits import check_count
from hflow_rt.manifest import Graph, Manifest, Precision, Role, Tensor
from hflow_rt.memory import guarded, need
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.latents import check_latents
from hflow_rt.runtime.noise import draw_latents, draw_noise, parse_std
from hflow_rt.runtime.pictures import check_pixels, from_uint8

__all__ = [
    "BACKENDS",
    "DEVICES",
    "LATENT_SPACE",
    "ONNX_DEVICES",
    "Array",
    "Encoded",
    "Engine",
    "Session",
    "Stds",
    "check_backend",
    "load",
    "open_bundle",
]

Array = NDArray[np.float32]
Stds = float | str | Sequence[str] | Mapping[str, float]  # see `parse_std`

# name -> (module with `open_engine`, what it is); also what the command line offers
BACKENDS = {
    "onnx": ("hflow_rt.runtime.onnx", "ONNX Runtime on the exported graphs"),
    "trt": ("hflow_rt.runtime.tensorrt", "TensorRT, or TensorRT for RTX, on the engines built for this GPU"),
    "torch": ("hflow_rt.runtime.torch", "PyTorch on the bundled weights, constants folded"),
}
DEVICES = ("auto", "cpu", "cuda")
# of the onnx backend only, for who asks for them: ONNX Runtime hands the graph to TensorRT, or to TensorRT for RTX
ONNX_DEVICES = ("tensorrt", "rtx")
LATENT_SPACE = "z"  # the space of the latents themselves


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

    def close(self) -> None:
        """Give back what it holds on a GPU. Once closed it does not run again."""


@dataclass(frozen=True)
class Encoded:
    """Latents by name `[B, *shape]` and log-probability `[B]` in nats (bits/dim = -log_prob / (D ln 2) + bits).

    Conditions that were given are among the latents, so that `forward` is told the same.
    """

    latents: dict[str, Any]
    log_prob: Any


class Session:
    """A loaded model. Arrays come back as the kind that went in: numpy, or torch on the tensor's device."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self._engine = engine

    @property
    def backend(self) -> str:
        """What actually runs."""
        return self._engine.backend

    @property
    def graphs(self) -> Collection[str]:
        """The graphs that this backend can run."""
        return self._engine.graphs

    @property
    def verified(self) -> bool:
        """Whether what runs was proved to be the model: the bundle's graphs, or the TensorRT engines made of them."""
        return self._engine.verified

    @property
    def precision(self) -> Precision:
        """Of the arithmetic: as the graphs were written, but torch computes everything in float32."""
        precision: Precision = getattr(self._engine, "precision", self.manifest.precision)
        return precision

    @property
    def tensors(self) -> str | None:
        """The device, such as `cuda:0`, whose torch tensors go in and out without a copy through the host."""
        return self._engine.tensors

    @property
    def side_by_side(self) -> bool:
        """Whether several calls at once keep more processors busy than one after the other."""
        return bool(getattr(self._engine, "side_by_side", False))

    @property
    def engines(self) -> str | None:
        """The key of the TensorRT engines that run, see the manifest; None for another backend."""
        key: str | None = getattr(self._engine, "key", None)
        return key

    def close(self) -> None:
        """Give back memory of a GPU, which otherwise the end of the process does."""
        self._engine.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    @property
    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape without batch, coarse to fine."""
        return self.manifest.latent_shapes

    @property
    def choices(self) -> Choices:
        """The conditions beside image or latents: options by name, none for most models."""
        return self.manifest.choices

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """What `forward` takes: the latents, what is random beside them, and a one-hot vector for every choice."""
        noise = {tensor.name: tensor.shape for tensor in self._forward_inputs("noise", "uniform")}
        return self.latent_shapes | noise | {name: (len(options),) for name, options in self.choices.items()}

    @property
    def controls(self) -> dict[str, float]:
        """Numbers that `forward` can be given, by name, and their defaults."""
        return {tensor.name: float(tensor.default or 0) for tensor in self._forward_inputs("control")}

    @property
    def std(self) -> list[str]:
        """The std to draw samples at by default, in the form that `sample` and `draw` take."""
        return list(self.manifest.std)

    @property
    def resolution(self) -> int:
        """Side of the image."""
        return self.manifest.resolution

    @property
    def spaces(self) -> tuple[str, ...]:
        """The latents' own space and the others of the family, see `into_space`."""
        return (LATENT_SPACE, *self.manifest.spaces)

    @property
    def bits(self) -> int:
        """Bits of the data the model was trained on, which turn log-probabilities into bits per dimension."""
        return int(self.manifest.config.get("bits", 8))

    def bits_per_dim(self, log_prob: Any) -> Any:
        """Log-probabilities in nats as bits per dimension."""
        return -log_prob / (3 * self.resolution**2 * math.log(2)) + self.bits

    def space_shapes(self, space: str) -> dict[str, tuple[int, ...]]:
        """Name to shape without batch of what `into_space` yields, coarse to fine. Raises `DataError`."""
        shapes = self.input_shapes
        if space == LATENT_SPACE:
            return shapes
        into = self._graph(self._space(space)[0])
        replaced = {tensor.name for tensor in into.inputs}
        others = {name: shape for name, shape in shapes.items() if name not in replaced}
        return {tensor.name: tensor.shape for tensor in into.outputs} | others

    def joined(self, space: str = LATENT_SPACE) -> tuple[tuple[str, ...], ...]:
        """Groups of the tensors of `space` that are one vector in it or in another, which slerp turns together."""
        if space != LATENT_SPACE:
            return (tuple(tensor.name for tensor in self._graph(self._space(space)[0]).outputs),)
        graphs = [self.manifest.graphs.get(into) for into, _ in self.manifest.spaces.values()]
        return tuple(tuple(tensor.name for tensor in graph.inputs) for graph in graphs if graph is not None)

    def forward(self, latents: Mapping[str, Any], controls: Mapping[str, float] | None = None) -> Any:
        """Latents to images float32 `[B, 3, R, R]` in [0, 1].

        controls: those of `Session.controls` that shall not have their default. Raises `DataError` for what does not
        fit.
        """
        arrays, restore = self._received(latents)
        check_latents(arrays, self.input_shapes, "these latents")
        check_told(self.choices, arrays)
        arrays |= self._set(controls or {}, next(iter(arrays.values())))
        return restore(self.run_graph(self._route("forward"), arrays)["image"])

    def inverse(self, images: Any, conditions: Mapping[str, Any] | None = None) -> Encoded:
        """Images, float32 `[B, 3, R, R]` in [0, 1] or uint8 `[B, R, R, 3]`, to latents and log-probability.

        conditions: one-hot `[B, options]` for every choice of the model. Raises `DataError`.
        """
        arrays, restore = self._received({"image": images, **(conditions or {})})
        pixels = self._images(arrays.pop("image"))
        told = {name: (len(pixels), len(options)) for name, options in self.choices.items()}
        floats = ("float32", "torch.float32")
        given = {name: tuple(array.shape) for name, array in arrays.items() if str(array.dtype) in floats}
        if given != told or len(given) != len(arrays):
            wanted, found = (
                ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
                for shapes in (told, {name: array.shape for name, array in arrays.items()})
            )
            raise DataError(f"beside images this model needs {wanted}, float32 one-hot; received {found}")
        check_told(self.choices, arrays)
        outputs = self.run_graph(self._route("inverse"), {"image": pixels, **arrays}) | arrays
        return Encoded({name: restore(outputs[name]) for name in self.input_shapes}, restore(outputs["log_prob"]))

    def sample(self, n: int, std: Stds | None = None, seed: int = 0) -> Array:
        """`n` images float32 `[n, 3, R, R]`; image i depends on `seed` and i alone. Raises `DataError`.

        std: by default what the bundle says, `Session.std`.
        """
        check_count("the number of images", n)
        need(12 * n * self.resolution**2, f"{n:,} images", "ask for fewer together, with `draw` and `forward`")
        parts = [self.forward(latents) for latents in self.draw(range(n), std, seed)]
        return np.concatenate(parts)

    def draw(
        self,
        indices: Sequence[int],
        std: Stds | None = None,
        seed: int = 0,
        batch: int = 16,
        option: str | None = None,
    ) -> Iterator[dict[str, Array]]:
        """What `forward` takes for the images `indices` of `seed`, at most `batch` at a time; latents are the prior's.

        std: by default what the bundle says, `Session.std`.
        Where the model has a choice, `option` makes it for all, else each option comes in turn.
        """
        check_count("the batch", batch)
        stds = parse_std(self.std if std is None else std, self.latent_shapes)
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            drawn = draw_latents(self.latent_shapes, self.manifest.prior_std, seed, part, stds)
            for tensor in self._forward_inputs("noise", "uniform"):
                kind: Literal["noise", "uniform"] = "uniform" if tensor.role == "uniform" else "noise"
                drawn[tensor.name] = draw_noise(kind, tensor.name, tensor.shape, seed, part)
            told = in_turn(self.choices, part) if option is None else of_option(self.choices, option, len(part))
            yield drawn | told

    def into_space(self, space: str, latents: Mapping[str, Array]) -> dict[str, Array]:
        """Latents with those that have another form in `space` replaced by it; `z` is the latents themselves.

        Raises `DataError`.
        """
        shapes = self.space_shapes(space)
        check_latents(latents, self.input_shapes, "these latents")
        made = {} if space == LATENT_SPACE else self.run_graph(self._space(space)[0], latents)
        return {name: made[name] if name in made else latents[name] for name in shapes}

    def from_space(self, space: str, values: Mapping[str, Array]) -> dict[str, Array]:
        """The inverse of `into_space`."""
        check_latents(values, self.space_shapes(space), f"these values of space {space}")
        made = {} if space == LATENT_SPACE else self.run_graph(self._space(space)[1], values)
        return {name: made[name] if name in made else values[name] for name in self.input_shapes}

    def _space(self, space: str) -> tuple[str, str]:
        if space not in self.manifest.spaces:
            known = ", ".join(self.spaces)
            raise DataError(f"unknown space '{space}' for this {self.manifest.family} model; known: {known}")
        pair = self.manifest.spaces[space]
        for graph in pair:
            self._graph(graph)
        return pair

    def _forward_inputs(self, *roles: Role) -> list[Tensor]:
        """The inputs of these roles of the graph that leads to the image."""
        graph = self.manifest.graphs.get(self.manifest.routes.get("forward", ""))
        return [] if graph is None else [tensor for tensor in graph.inputs if tensor.role in roles]

    def _set(self, controls: Mapping[str, float], like: Any) -> dict[str, Any]:
        """Controls as inputs, for as many images as `like` has. Raises `DataError` for an unknown or impossible one."""
        known = {tensor.name: tensor for tensor in self._forward_inputs("control")}
        values = {}
        for name, value in controls.items():
            if name not in known:
                have = ", ".join(known) or "none"
                raise DataError(f"unknown control '{name}' of this {self.manifest.family} model; it has {have}")
            low, high = known[name].range or (-math.inf, math.inf)
            if not (low <= value <= high and math.isfinite(value)):
                raise DataError(f"control {name} must be a number in {low:g} .. {high:g}; found {value}")
            values[name] = _filled(like, (len(like), *known[name].shape), value)
        return values

    def _route(self, route: str) -> str:
        """The graph of `forward` or `inverse`. Raises `NoInverse` where the family has none."""
        if route in self.manifest.absent:
            raise NoInverse(self.manifest.absent[route])
        return self.manifest.routes.get(route, route)

    def _graph(self, name: str) -> Graph:
        if name not in self.manifest.graphs:
            have = ", ".join(self.manifest.graphs)
            raise BundleError(f"this bundle has no '{name}' engine (it has: {have}); export it with 'hflow-rt export'")
        return self.manifest.graphs[name]

    def run_graph(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run one graph by name, unchecked, on any batch size: batches beyond its largest are split."""
        graph = self._graph(name)
        count = len(next(values[tensor.name] for tensor in graph.inputs if tensor.name in values))
        inputs = [
            values[tensor.name] if tensor.name in values else _unset(tensor, count, values) for tensor in graph.inputs
        ]
        largest = graph.batch[1]
        with guarded(f"at {count:,} images a call", "take fewer images together (--batch or -n)"):
            parts = [
                self._engine.run(name, [array[start : start + largest] for array in inputs])
                for start in range(0, count, largest)
            ]
        joined = [outputs[0] if len(outputs) == 1 else _concatenate(outputs) for outputs in zip(*parts, strict=True)]
        return {tensor.name: array for tensor, array in zip(graph.outputs, joined, strict=True)}

    def _received(self, arrays: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """The inputs as the engine takes them, and a function that gives results their kind and device."""
        if {_library(array) for array in arrays.values()} == {"torch"}:
            _check_tensors(arrays)
            if {str(tensor.device) for tensor in arrays.values()} == {self._engine.tensors}:
                return {name: tensor.detach() for name, tensor in arrays.items()}, lambda tensor: tensor
        return _to_numpy(arrays)

    def _images(self, images: Any) -> Any:
        side = self.resolution
        if str(images.dtype) in ("uint8", "torch.uint8"):
            if _library(images) == "torch":  # on a GPU
                images = images.permute(0, 3, 1, 2).float() / 255 if images.ndim == 4 else images
            else:
                check_pixels(images)
                images = from_uint8(images)
        if images.ndim != 4 or images.shape[1:] != (3, side, side) or len(images) < 1:
            wanted = f"float32 [B, 3, {side}, {side}] or uint8 [B, {side}, {side}, 3]"
            raise DataError(f"images must be {wanted}, not {list(images.shape)}")
        if str(images.dtype) not in ("float32", "torch.float32"):
            raise DataError(f"images must be float32 in [0, 1] or uint8, not {images.dtype}")
        if not ((images >= 0) & (images <= 1)).all():  # NaN is neither
            raise DataError("images must lie in [0, 1]; found values outside, NaN or infinity")
        return images


def load(path: Path | str, backend: str = "onnx", device: str = "auto", *, cuda_graph: bool | None = None) -> Session:
    """Open the bundle (or exported run) at `path`.

    backend: see `BACKENDS`. device: `cpu`, `cuda`, or `auto` for the best that works; `onnx` also knows
    `ONNX_DEVICES`. cuda_graph: whether the work is replayed as one CUDA graph; by default `trt` does and `onnx`
    does not. Raises `BundleError` for a missing or changed bundle, `EngineMismatch` for
    engines of another machine and `BackendUnavailable` for a backend or device that is not there; there is no
    fallback. Warns where the weights of a run are newer than its bundle.
    """
    check_backend(backend, device)
    bundle = find_bundle(path)
    if bundle.outdated is not None:
        warnings.warn(bundle.outdated, stacklevel=2)
    return open_bundle(bundle, backend, device, cuda_graph=cuda_graph)


def check_backend(backend: str, device: str) -> None:
    """Raise `BackendUnavailable` for names that nobody knows, before anything is read."""
    if backend not in BACKENDS:
        raise BackendUnavailable(f"unknown backend '{backend}'; known: {', '.join(BACKENDS)}")
    if device in ONNX_DEVICES and backend != "onnx":
        raise BackendUnavailable(f"device '{device}' is for the onnx backend, not for {backend}; use --device cuda")
    if device not in (*DEVICES, *ONNX_DEVICES):
        raise BackendUnavailable(f"unknown device '{device}'; known: {', '.join(DEVICES)}")


def open_bundle(bundle: Bundle, backend: str, device: str, *, cuda_graph: bool | None = None) -> Session:
    """`load` for a bundle that was found already."""
    import importlib

    if cuda_graph is not None and backend == "torch":
        raise BackendUnavailable("the torch backend has no CUDA graph; use trt or onnx")
    module = importlib.import_module(BACKENDS[backend][0])
    settings = {} if cuda_graph is None else {"cuda_graph": cuda_graph}
    return Session(bundle, module.open_engine(bundle, device, **settings))


def _unset(tensor: Tensor, count: int, values: Mapping[str, Any]) -> Any:
    """What an input has that nobody gave: a control its default, noise its mean. Raises `DataError` for others."""
    means = {"control": tensor.default, "noise": 0.0, "uniform": 0.5}
    if means.get(tensor.role) is None:
        raise DataError(f"'{tensor.name}' [B, {', '.join(map(str, tensor.shape))}] is needed and was not given")
    return _filled(next(iter(values.values())), (count, *tensor.shape), means[tensor.role])


def _filled(like: Any, shape: tuple[int, ...], value: float | None) -> Any:
    """A float32 array, or a tensor where `like` is."""
    return like.new_full(shape, value) if _library(like) == "torch" else np.full(shape, value, np.float32)


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _check_tensors(tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in ("torch.float32", "torch.uint8"):  # numpy has no bfloat16
            raise DataError(f"'{name}' must be float32 (pixels may be uint8), not {tensor.dtype}")


def _concatenate(parts: Sequence[Any]) -> Any:
    if _library(parts[0]) == "torch":
        import torch

        return torch.cat(list(parts))
    return np.concatenate(parts)


def _to_numpy(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Numpy views of the inputs, and a function that gives results the kind and device of the first input."""
    kinds = {type(array).__name__: _library(array) for array in arrays.values()}
    if all(isinstance(array, np.ndarray) for array in arrays.values()):
        return dict(arrays), lambda array: array
    if set(kinds.values()) != {"torch"}:
        raise DataError(f"arrays must be all numpy or all torch, not {' and '.join(sorted(kinds))}")
    import torch

    device = next(iter(arrays.values())).device
    return {n: t.detach().cpu().numpy() for n, t in arrays.items()}, lambda a: torch.from_numpy(a).to(device)
