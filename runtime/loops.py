"""Routes of several calls: one graph once, then another once a row of a schedule, its outputs fed back."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hflow_rt.manifest import Graph
from hflow_rt.runtime.arrays import as_kind, given, stacked
from hflow_rt.runtime.engines.engine import Calls, Engine
from hflow_rt.runtime.in_flight import in_flight
from hflow_rt.runtime.noise import Stream

__all__ = ["calls_of", "drawn_by_call", "first_inputs", "follow", "mean_draws", "row_of", "shortened"]

Values = Mapping[str, Any]


class _Loop(Protocol):
    """What the contract's `Loop` and the manifest's have in common."""

    @property
    def step(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def carry(self) -> Mapping[str, str]: ...
    @property
    def last(self) -> tuple[str, ...]: ...
    @property
    def every(self) -> Mapping[str, str]: ...


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


def drawn_by_call(step: Iterable[_Tensor]) -> list[str]:
    """Of the inputs of a loop's `step` those that every call has a draw of its own of."""
    return [tensor.name for tensor in step if tensor.role in ("noise", "uniform")]


def shortened(
    schedule: Mapping[str, NDArray[np.float32]], leads_to: Collection[str], steps: int
) -> dict[str, NDArray[np.float32]]:
    """The schedule of a loop of `steps` calls, of all down to 1: rows evenly chosen, the first and the last among them.

    Tables that say where a call leads, `leads_to`, have there the row before the next one that was chosen.
    """
    calls = len(next(iter(schedule.values())))
    rows = np.linspace(0, calls - 1, steps).round().astype(int)
    ends = np.append(rows[1:] - 1, calls - 1)
    return {name: table[ends if name in leads_to else rows] for name, table in schedule.items()}


def row_of(
    schedule: Mapping[str, NDArray[np.float32]], drawn: Collection[str], values: Values, index: int
) -> dict[str, Any]:
    """What is new in call `index`, by input: rows `[1, *shape]` of the schedule, draws `[B, *shape]`.

    drawn: names of arrays `[B, K, *shape]`, or streams of them, among `values`.
    """
    rows: dict[str, Any] = {name: table[index : index + 1] for name, table in schedule.items()}
    for name in drawn:
        draws = values[name]
        rows[name] = draws.step(index) if isinstance(draws, Stream) else draws[:, index]
    return rows


def calls_of(
    engine: Engine,
    loop: _Loop,
    step: Graph,
    schedule: Mapping[str, NDArray[np.float32]],
    values: Values,
    every: Collection[str],
) -> Callable[[dict[str, Any]], Iterator[Values]]:
    """The calls of a loop as `follow` takes them, on a backend; what one takes anew is made while the one before runs.

    values: what the route was given, the draws of all calls among it. every: outputs wanted of every call.
    """
    drawn, like = drawn_by_call(step.inputs), next(iter(values.values()))

    def row(index: int) -> dict[str, Any]:
        return {name: as_kind(like, array) for name, array in row_of(schedule, drawn, values, index).items()}

    def calls(first: dict[str, Any]) -> Iterator[Values]:
        others = [tensor for tensor in step.inputs if tensor.name not in {*schedule, *drawn}]
        fixed = {tensor.name: given(tensor, first, len(like)) for tensor in others}
        return engine.loop(Calls(loop.step, fixed, in_flight(row, range(loop.steps), 2), loop.carry, every))

    return calls


def mean_draws(step: Graph, steps: int, values: Values) -> dict[str, Any]:
    """The mean in place of what is drawn in every call and was not given, `[B, steps, *shape]` each."""
    like = next(iter(values.values()))
    return {
        tensor.name: stacked([given(tensor, values, len(like))] * steps)
        for tensor in step.inputs
        if tensor.name in drawn_by_call(step.inputs) and tensor.name not in values
    }


def first_inputs(loop: _Loop, values: Values, begun: Values) -> dict[str, Any]:
    """The inputs of the first call beside its row: what the route was given, and what `start` made of it."""
    return {**values, **begun} | {entered: begun[left] for left, entered in loop.carry.items()}


def follow(
    loop: _Loop,
    values: Values,
    begun: Values,
    calls: Callable[[dict[str, Any]], Iterator[Values]],
    latents: Collection[str],
) -> dict[str, Any]:
    """The outputs of a route by name.

    values: what it was given. begun: what its `start` made of that. calls: all calls of `step` on the inputs of the
    first. latents: names of what the route yields of `begun`.
    """
    each: dict[str, list[Any]] = {name: [] for name in loop.every}
    outputs: Values = {}
    for outputs in calls(first_inputs(loop, values, begun)):
        for name, parts in each.items():
            parts.append(outputs[name])
    found = {name: begun[name] for name in latents if name in begun} | {name: outputs[name] for name in loop.last}
    return found | {loop.every[name]: stacked(parts) for name, parts in each.items()}
