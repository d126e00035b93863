"""What is random in the samples of a bundle: latents by their priors, noise beside them and in every call of a loop."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hflow_rt.choices import Route
from hflow_rt.errors import DataError
from hflow_rt.limits import check_count
from hflow_rt.manifest import Graph, Loop, Role, Tensor, graphs_of
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.loops import drawn_by_call, shortened
from hflow_rt.runtime.noise import Stream, draw_latents, draw_noise, draw_rows

__all__ = ["Draw", "Drawing"]

Array = NDArray[np.float32]


class Draw(NamedTuple):
    """A tensor beside the latents, `[B, *shape]`; with `steps` `[B, steps, *shape]`, one draw for each call."""

    kind: Literal["noise", "uniform"]
    shape: tuple[int, ...]
    steps: int | None

    @property
    def whole(self) -> tuple[int, ...]:
        """Its shape without batch, all calls together."""
        return self.shape if self.steps is None else (self.steps, *self.shape)


class Drawing:
    """Draws what routes take, and knows what that is."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._manifest = bundle, bundle.manifest
        self._tables: dict[str, dict[str, Array]] = {}

    @property
    def scaled(self) -> list[str]:
        """The latents that a std applies to."""
        return [latent.name for latent in self._manifest.latents if latent.prior == "normal"]

    def inputs(self, *roles: Role, route: Route = "forward") -> list[Tensor]:
        """The inputs of these roles of all that a route runs, each once; none where the bundle lacks the route."""
        found = {tensor.name: tensor for graph in self._graphs(route) for tensor in graph.inputs}
        return [tensor for tensor in found.values() if tensor.role in roles]

    def beside(self, route: Route = "forward", every: bool = False) -> dict[str, Draw]:
        """What is random beside latents or images, by name; `every`: also what has a default instead."""
        way = self._manifest.routes.get(route)
        steps = way.steps if isinstance(way, Loop) else None
        by_call = () if steps is None else drawn_by_call(self._graphs(route)[-1].inputs)
        return {
            tensor.name: Draw(
                "uniform" if tensor.role == "uniform" else "noise",
                tensor.shape,
                steps if tensor.name in by_call else None,
            )
            for tensor in self.inputs("noise", "uniform", route=route)
            if every or tensor.default is None
        }

    def latents(self, seed: int, indices: Sequence[int], stds: Mapping[str, float]) -> dict[str, Array]:
        """Those of the images `indices` of `seed`, each from where its prior says. Raises `DataError`.

        stds: of the `scaled` ones.
        """
        shapes = {latent.name: latent.shape for latent in self._manifest.latents if latent.prior != "bank"}
        all_stds = {name: stds.get(name, 1.0) for name in shapes}
        drawn = draw_latents(shapes, self._manifest.prior_std, seed, indices, all_stds) if shapes else {}
        if self._manifest.bank is not None:
            bank = self.table(self._manifest.bank)
            rows = draw_rows(len(next(iter(bank.values()))), seed, indices)
            drawn |= {name: table[rows] for name, table in bank.items()}
        if missing := [latent.name for latent in self._manifest.latents if latent.name not in drawn]:
            raise DataError(
                f"samples take '{missing[0]}' from a bank of training images, and this model has none; give it one"
                " with 'hflow-rt import FILE --images IMAGES', or decode latents of images"
            )
        return {latent.name: drawn[latent.name] for latent in self._manifest.latents}

    def noise(self, seed: int, indices: Sequence[int], route: Route = "forward", every: bool = False) -> dict[str, Any]:
        """What is random beside latents or images; what every call draws is a stream, made as it is asked for."""
        return {
            name: draw_noise(draw.kind, name, draw.shape, seed, indices)
            if draw.steps is None
            else Stream(draw.kind, name, draw.shape, seed, indices, draw.steps)
            for name, draw in self.beside(route, every).items()
        }

    def of(self, tensors: Sequence[Tensor], seed: int, indices: Sequence[int]) -> dict[str, Array]:
        """What is random among the inputs of a graph."""
        found: dict[str, Array] = {}
        for tensor in tensors:
            if tensor.role in ("noise", "uniform"):
                kind: Literal["noise", "uniform"] = "noise" if tensor.role == "noise" else "uniform"
                found[tensor.name] = draw_noise(kind, tensor.name, tensor.shape, seed, indices)
        return found

    def table(self, file: str) -> dict[str, Array]:
        """The arrays of a file of the bundle by name. Raises `BundleError` for one that is missing or changed."""
        if file not in self._tables:
            self._tables[file] = self._bundle.table(file)
        return self._tables[file]

    def schedule(self, loop: Loop) -> dict[str, Array]:
        """The tables `[steps, *shape]` of a loop, which may take fewer calls than its file has. Raises as `table`."""
        return shortened(self.table(loop.schedule), loop.leads_to, loop.steps)

    def in_steps(self, steps: int) -> Bundle:
        """The bundle with loops of so many calls. Raises `DataError` where that is not possible."""
        loops = {name: way for name, way in self._manifest.routes.items() if isinstance(way, Loop)}
        what = f"this {self._manifest.family} model"
        if not loops:
            raise DataError(f"the number of steps is for models of many, and {what} takes one; omit it")
        most = min(len(next(iter(self.table(loop.schedule).values()))) for loop in loops.values())
        check_count("the number of steps", steps)
        if steps > most:
            raise DataError(f"the number of steps must be at most {most}, of {what}; found {steps}")
        if steps < most and not all(loop.leads_to for loop in loops.values()):
            raise DataError(
                f"fewer than {most} steps need the mean and variance of training images, and {what} lacks them;"
                " omit the number, or import it again with --images"
            )
        fewer = {name: loop.model_copy(update={"steps": steps}) for name, loop in loops.items()}
        manifest = self._manifest.model_copy(update={"routes": self._manifest.routes | fewer})
        return replace(self._bundle, manifest=manifest)

    def _graphs(self, route: Route) -> list[Graph]:
        way = self._manifest.routes.get(route)
        known = self._manifest.graphs
        return [] if way is None else [known[name] for name in graphs_of(way) if name in known]
