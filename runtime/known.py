"""What is known of an opened model without running it."""

import math
from collections.abc import Collection
from typing import Any, Literal

from hflow_rt.choices import Precision
from hflow_rt.conditions import Options
from hflow_rt.errors import DataError
from hflow_rt.manifest import CALIBRATED, Loop, Space, Way
from hflow_rt.runtime.running import Runner

__all__ = ["LATENT_SPACE", "Known"]

LATENT_SPACE = "z"  # the space of the latents themselves


class Known(Runner):
    """A bundle and its engine, described; a `Session` is that and runs it."""

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
    def calibrated(self) -> str | None:
        """At what the weights were calibrated, in the words of `export --calibrate`; None where they were not."""
        return self.manifest.checkpoint.get(CALIBRATED)

    @property
    def precision(self) -> Precision:
        """Of the arithmetic: as the graphs were written, but torch computes everything in float32."""
        return self._engine.precision or self.manifest.precision

    @property
    def tensors(self) -> str | None:
        """The device, such as `cuda:0`, whose torch tensors go in and out without a copy through the host."""
        return self._engine.tensors

    @property
    def side_by_side(self) -> bool:
        """Whether several calls together keep more processors busy than one after the other."""
        return self._engine.side_by_side

    @property
    def engines(self) -> str | None:
        """The key of the TensorRT engines that run, see the manifest; None for another backend."""
        return self._engine.key

    @property
    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape without batch, coarse to fine."""
        return self.manifest.latent_shapes

    @property
    def conditions(self) -> Options:
        """The conditions beside image or latents: options by name, none for most models."""
        return self.manifest.conditions

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """What `forward` takes: the latents, what is random beside them, and a one-hot vector for every choice.

        Of what is random in every call of a loop `[K, *shape]`.
        """
        noise = {name: draw.whole for name, draw in self.drawing.beside().items()}
        return self.latent_shapes | noise | {name: (len(options),) for name, options in self.conditions.items()}

    @property
    def controls(self) -> dict[str, float]:
        """Numbers that `forward` can be given, by name, and their defaults."""
        return {tensor.name: float(tensor.default or 0) for tensor in self.drawing.inputs("control")} | self._chosen

    @property
    def steps(self) -> int:
        """Calls of its network that `forward` takes."""
        route = self.manifest.routes.get("forward")
        return route.steps if isinstance(route, Loop) else 1

    @property
    def std(self) -> list[str]:
        """The std to draw samples at by default, in the form that `sample` and `draw` take."""
        return list(self.manifest.std)

    @property
    def resolution(self) -> int:
        """Side of the image."""
        return self.manifest.resolution

    @property
    def channels(self) -> int:
        """C, of the image: 3, or 1 for a model of grey images."""
        return self.manifest.channels

    @property
    def spaces(self) -> tuple[str, ...]:
        """The latents' own space and the others of the family, see `into_space`."""
        ways = self.manifest.spaces.items()
        return (LATENT_SPACE, *(name for name, space in ways if space.into and (space.back or space.decode)))

    @property
    def bits(self) -> int:
        """Bits of the data the model was trained on, which turn log-probabilities into bits per dimension."""
        return int(self.manifest.config.get("bits", 8))

    def bits_per_dim(self, log_prob: Any) -> Any:
        """Log-probabilities in nats as bits per dimension."""
        return -log_prob / (self.channels * self.resolution**2 * math.log(2)) + self.bits

    def space_shapes(self, space: str) -> dict[str, tuple[int, ...]]:
        """Name to shape without batch of what `into_space` yields, coarse to fine. Raises `DataError`."""
        shapes = self.input_shapes
        if space == LATENT_SPACE:
            return shapes
        into = self._graph(self._way(space, "into"))
        replaced = {tensor.name for tensor in into.inputs}
        others = {name: shape for name, shape in shapes.items() if name not in replaced}
        return {tensor.name: tensor.shape for tensor in into.outputs} | others

    @property
    def levels(self) -> tuple[str, ...]:
        """What decides an image, coarse to fine: the latents, and what is random beside them in the calls of a loop."""
        return (*self.latent_shapes, *self.drawing.beside())

    def ways(self, way: Way) -> list[str]:
        """What interpolations take from one image to another in this way, whatever their mode."""
        named = [latent.name for latent in self.manifest.latents if latent.way == way]
        drawn = [name for name, draw in self.drawing.beside().items() if draw.kind == "noise"]
        return named + (drawn if way == "arc" else [])

    def joined(self, space: str = LATENT_SPACE) -> tuple[tuple[str, ...], ...]:
        """Groups of the tensors of `space` that are one vector in it or in another, which slerp turns together."""
        if space != LATENT_SPACE:
            return (tuple(tensor.name for tensor in self._graph(self._way(space, "into")).outputs),)
        graphs = [self.manifest.graphs.get(found.into or "") for found in self.manifest.spaces.values()]
        groups = (tuple(tensor.name for tensor in graph.inputs) for graph in graphs if graph is not None)
        return tuple(dict.fromkeys(groups))

    def _space(self, space: str) -> Space:
        if space not in self.manifest.spaces:
            known = ", ".join(self.spaces)
            raise DataError(f"unknown space '{space}' for this {self.manifest.family} model; known: {known}")
        return self.manifest.spaces[space]

    def _way(self, space: str, way: Literal["into", "back"]) -> str:
        """The graph into a space, or back."""
        graph = getattr(self._space(space), way)
        if graph is None:
            lead = "cannot be entered from latents" if way == "into" else "leads to images only"
            raise DataError(f"space {space} of this {self.manifest.family} model {lead}; choose another --space")
        self._graph(graph)
        return str(graph)
