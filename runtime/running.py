"""Running the graphs and routes of a bundle on an engine: any batch size, one call or many; nothing is checked."""

from collections.abc import Collection, Mapping
from typing import Any

from hflow_rt.choices import Route
from hflow_rt.errors import BundleError, NoInverse
from hflow_rt.manifest import Graph, Loop, Manifest
from hflow_rt.memory import guarded
from hflow_rt.runtime.arrays import concatenated, given
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.drawing import Drawing
from hflow_rt.runtime.engines.engine import Engine
from hflow_rt.runtime.loops import calls_of, follow, mean_draws

__all__ = ["Runner"]

_FEWER = "take fewer images together (--batch or -n)"


class Runner:
    """A bundle and the engine that runs it. Arrays are numpy, or torch where the engine's tensors are."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.drawing = Drawing(bundle)
        self._engine = engine
        self._chosen: dict[str, float] = {}  # controls that have another default than the model's

    def run(self, route: Route, values: Mapping[str, Any], only: str | None = None) -> dict[str, Any]:
        """The outputs of a route, unchecked, on any batch size. Raises `NoInverse` where the family has none.

        only: the one output that is wanted; of a loop whose start has it, that alone runs.
        """
        self._check_route(route)
        found = self.manifest.routes.get(route, route)
        if isinstance(found, str):
            return self.run_graph(found, values)
        if only in [tensor.name for tensor in self._graph(found.start).outputs]:
            return self.run_graph(found.start, values)
        largest = min(self._largest(name) for name in found.graphs)
        count = len(next(iter(values.values())))
        parts = [
            self._follow(found, {name: value[start : start + largest] for name, value in values.items()})
            for start in range(0, count, largest)
        ]
        return {name: concatenated([part[name] for part in parts]) for name in parts[0]}

    def can(self, route: Route) -> bool:
        """Whether the family has this route."""
        return route not in self.manifest.absent

    def _check_route(self, route: Route) -> None:
        if route in self.manifest.absent:
            raise NoInverse(self.manifest.absent[route])

    def _follow(self, loop: Loop, values: Mapping[str, Any]) -> dict[str, Any]:
        """One batch through a loop."""
        values, begun, calls = self._begun(loop, values, loop.every.keys())
        with guarded(f"at {len(next(iter(values.values()))):,} images a call", _FEWER):
            return follow(loop, values, begun, calls, self.manifest.latent_shapes)

    def _begun(self, loop: Loop, values: Mapping[str, Any], every: Collection[str]) -> tuple[Any, Any, Any]:
        """What a loop is given, what its start makes of it, and its calls, with the outputs wanted of every one."""
        step, schedule = self._graph(loop.step), self.drawing.schedule(loop)
        values = {**mean_draws(step, loop.steps, values), **values}
        return values, self.run_graph(loop.start, values), calls_of(self._engine, loop, step, schedule, values, every)

    def run_graph(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run one graph by name, unchecked, on any batch size: batches beyond its largest are split."""
        graph = self._graph(name)
        batched = [tensor for tensor in graph.inputs if tensor.role != "schedule"]
        count = len(next(values[tensor.name] for tensor in batched if tensor.name in values))
        inputs = [given(tensor, values, count) for tensor in graph.inputs]
        largest = self._largest(name)
        with guarded(f"at {count:,} images a call", _FEWER):
            parts = [
                self._engine.run(
                    name,
                    [
                        array if tensor.role == "schedule" else array[start : start + largest]
                        for tensor, array in zip(graph.inputs, inputs, strict=True)
                    ],
                )
                for start in range(0, count, largest)
            ]
        joined = [outputs[0] if len(outputs) == 1 else concatenated(outputs) for outputs in zip(*parts, strict=True)]
        return {tensor.name: array for tensor, array in zip(graph.outputs, joined, strict=True)}

    def _graph(self, name: str) -> Graph:
        if name not in self.manifest.graphs:
            have = ", ".join(self.manifest.graphs)
            raise BundleError(f"this bundle has no '{name}' engine (it has: {have}); export it with 'hflow-rt export'")
        return self.manifest.graphs[name]

    def _largest(self, name: str) -> int:
        """The largest batch of one call of a graph."""
        of_graph = self._graph(name).batch[1]
        return min(of_graph, self._engine.largest or of_graph)
