"""Is the engine the model? Every graph against the torch reference in float64, on the same inputs.

Loops are compared call by call and as a whole. How large an error may be is for `judging` to say.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hflow_rt.conditions import in_turn
from hflow_rt.errors import DataError
from hflow_rt.export.judging import ROUND_TRIP, compare, criteria, failures, finite, set_tolerances
from hflow_rt.manifest import graphs_of
from hflow_rt.models.family import LOG_PROB, GraphSpec, LatentModel, Loop, Role, Route, TensorSpec
from hflow_rt.runtime.arrays import given
from hflow_rt.runtime.engines.engine import Calls, looped
from hflow_rt.runtime.latents.round_trips import encoded, round_trip
from hflow_rt.runtime.loops import drawn_by_call, follow, mean_draws, row_of, shortened
from hflow_rt.runtime.session import Session

__all__ = ["STDS", "run_parity"]

Array = NDArray[Any]
STDS = (0.5, 0.7, 1.0)
BATCHES = (1, 3)
FEW_IMAGES = 2  # of a loop
FEW_STEPS = 3  # of a loop that may take fewer calls
DRAWS = 24  # in all at std 1, of a graph whose outputs are short vectors
_Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True)
class _Case:
    """One run of a graph: `about` it, and by output what the engine, float64 and torch float32 found."""

    about: dict[str, Any]
    outputs: dict[str, tuple[Array, Array, Array]]


@dataclass(frozen=True)
class _Pair:
    """A graph and its reference in float64 and in float32."""

    spec: GraphSpec
    exact: nn.Module
    plain: nn.Module

    def takes(self, role: Role) -> bool:
        return any(tensor.role == role for tensor in self.spec.inputs)

    def yields(self, role: Role) -> bool:
        return any(tensor.role == role for tensor in self.spec.outputs)

    def compared(self, about: dict[str, Any], session: Session, values: Mapping[str, Array]) -> _Case:
        """Run it on float32 `values` by name, of which it takes its inputs."""
        found = session.run_graph(self.spec.name, values)
        exact, plain = self.exact_outputs(values), self.plain_outputs(values)
        return _Case(about, {name: (found[name], exact[name], plain[name]) for name in exact})

    def plain_outputs(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """What torch finds in float32."""
        return self._run(self.plain, torch.float32, values)

    def exact_outputs(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """What torch finds in float64."""
        return self._run(self.exact, torch.float64, values)

    @torch.no_grad()
    def _run(self, module: nn.Module, dtype: torch.dtype, values: Mapping[str, Array]) -> dict[str, Array]:
        outputs = module(*[torch.from_numpy(values[tensor.name]).to(dtype) for tensor in self.spec.inputs])
        return {tensor.name: value.numpy() for tensor, value in zip(self.spec.outputs, outputs, strict=True)}


def run_parity(
    model: LatentModel,
    session: Session,
    images: Array,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compare every graph the bundle has; returns a JSON-ready report with `passed`.

    `graphs` has the errors of every case of a graph by output, `pooled` those over all its cases with the tolerance of
    each statistic, the round trip of images among them. images: float32 `[N, C, R, R]` in [0, 1], N at least 1.
    Raises `DataError` if there is nothing to compare.
    """
    if len(images) < 1:
        raise DataError("parity needs at least one image")
    graphs = {name: spec for name, spec in model.float().eval().graphs().items() if name in session.graphs}
    exact = copy.deepcopy({name: spec.reference for name, spec in graphs.items()})  # together: what they share, once
    pairs = {name: _Pair(spec, exact[name].double().eval(), spec.reference.eval()) for name, spec in graphs.items()}
    cases: dict[str, list[_Case]] = {}
    loops = {route: way for route, way in model.routes().items() if isinstance(way, Loop) and {*way.graphs} <= {*pairs}}
    for route, loop in loops.items():
        progress(f"comparing {route}, {loop.steps} steps")
        cases |= _loop_cases(route, loop, pairs, session, images, seed)
        if loop.leads_to and loop.steps > FEW_STEPS:  # whose calls lead further
            fewer = replace(loop, schedule=shortened(loop.schedule, loop.leads_to, FEW_STEPS))
            found = _loop_cases(route, fewer, pairs, session.in_steps(FEW_STEPS), images, seed)
            found[f"{route} in {FEW_STEPS} steps"] = found.pop(f"{route} loop")
            cases |= {name: cases.get(name, []) + more for name, more in found.items()}
    of_images = [pair for name, pair in pairs.items() if pair.takes("image") and name not in cases]
    if of_images:
        progress(f"comparing {', '.join(pair.spec.name for pair in of_images)}")
        cases |= _image_cases(of_images, session, images, seed)
    others = [pair for name, pair in pairs.items() if not cases.get(name)]
    if others:
        progress(f"comparing {', '.join(pair.spec.name for pair in others)}")
        cases |= _latent_cases(others, session, seed)
    report: dict[str, Any] = {
        "backend": session.backend,
        "reference": "torch float64",
        **criteria(session.precision),
        "graphs": {graph: [_told(case) for case in found] for graph, found in cases.items()},
        "pooled": {graph: _pooled(found) for graph, found in cases.items()},
    }
    if model.round_trip() is not None and session.manifest.routes.keys() >= {"forward", "inverse"}:
        progress("comparing round trips")
        trips = list(_round_trips(model.routes(), pairs, session, images, cases))
        report[ROUND_TRIP] = [{"path": "image", **case.about, **_told(case)["outputs"]["image"]} for case in trips]
        if model.round_trip() == "exact":
            if session.steps > 1:
                few, told = _few(images), in_turn(session.conditions, range(FEW_IMAGES))
                latents = encoded(session, few, told).latents
                report["came_back"] = round_trip(session, few, latents).model_dump(mode="json")
            report[ROUND_TRIP].append(_latent_trip(session, seed))
            report["pooled"][ROUND_TRIP] = _pooled(trips)
    set_tolerances(report)
    report["images"] = len(images)
    report["failures"] = failures(report) + [f"{name} was not compared" for name in graphs if not cases.get(name)]
    report["passed"] = not report["failures"]
    return report


def _told(case: _Case) -> dict[str, Any]:
    return case.about | {
        "outputs": {name: compare(*values, picture=name == "image") for name, values in case.outputs.items()}
    }


def _pooled(cases: Sequence[_Case]) -> dict[str, Any]:
    """Errors of every output over all cases, as `compare` has them."""
    entries = {}
    for name in cases[0].outputs if cases else ():
        every = zip(*(case.outputs[name] for case in cases), strict=True)
        found, exact, plain = (np.concatenate([values.ravel() for values in kind]) for kind in every)
        entries[name] = compare(found, exact, plain, picture=name == "image")
    return entries


def _image_cases(pairs: Sequence[_Pair], session: Session, images: Array, seed: int) -> dict[str, list[_Case]]:
    """Graphs that take images, and what graphs before them yield; whatever is random differs in all values."""
    cases: dict[str, list[_Case]] = {pair.spec.name: [] for pair in pairs}
    rngs = [np.random.default_rng(seed) for _ in pairs]
    for chosen in _batches(images, seed):
        batch = len(chosen)
        values = {"image": chosen, **in_turn(session.conditions, range(batch))}
        for pair, rng in zip(pairs, rngs, strict=True):
            case = pair.compared({"batch": batch}, session, values | _drawn(pair.spec.inputs, batch, rng))
            if not all(np.isfinite(plain).all() for _, _, plain in case.outputs.values()):
                raise DataError(
                    "the model itself overflows on these images, in torch as in any engine: they are too far from what"
                    " it was trained on; name images like those with --images"
                )
            if LOG_PROB in case.outputs:
                found, exact, _ = case.outputs[LOG_PROB]
                dimensions = chosen[0].size * math.log(2)
                case.about["bits_per_dim_difference"] = float(finite(np.abs(found - exact)).max()) / dimensions
            cases[pair.spec.name].append(case)
            values = {name: exact.astype(np.float32) for name, (_, exact, _) in case.outputs.items()} | values
    return cases


def _latent_cases(pairs: Sequence[_Pair], session: Session, seed: int) -> dict[str, list[_Case]]:
    """Graphs that take latents, or what the graphs before them yield: other values would be far from any they know."""
    cases: dict[str, list[_Case]] = {pair.spec.name: [] for pair in pairs}
    rng = np.random.default_rng(seed)
    few = [(batch, std) for batch in BATCHES for std in STDS]
    for batch, std in (*few, (DRAWS - sum(BATCHES), 1.0)):
        values = _latents(session, seed, batch, std)
        for pair in pairs:
            if pair.yields("image") and (batch, std) not in few:
                continue
            values |= _drawn(pair.spec.inputs, batch, rng)
            case = pair.compared({"batch": batch, "std": std}, session, values)
            cases[pair.spec.name].append(case)
            values |= {name: exact.astype(np.float32) for name, (_, exact, _) in case.outputs.items()}
    return cases


def _loop_cases(
    route: Route, loop: Loop, pairs: Mapping[str, _Pair], session: Session, images: Array, seed: int
) -> dict[str, list[_Case]]:
    """Both graphs of a loop, `step` at states of the float64 trajectory, and whole trajectories under `ROUTE loop`.

    What carries the loop is never compared far from where it goes: the states that one call is given are those of the
    reference, rounded to float32, in the first call, in the middle and in the last.
    """
    start, step = (pairs[name] for name in loop.graphs)
    rng = np.random.default_rng(seed)
    about: dict[str, Any]
    if route == "inverse":
        about, values = {"batch": FEW_IMAGES}, {"image": _few(images), **in_turn(session.conditions, range(FEW_IMAGES))}
    else:
        about, values = {"batch": FEW_IMAGES, "std": 1.0}, _latents(session, seed, FEW_IMAGES, 1.0)
    values |= _drawn([tensor for tensor in start.spec.inputs if tensor.name not in values], FEW_IMAGES, rng)
    new = [tensor for tensor in step.spec.inputs if tensor.name not in values]
    by_call = drawn_by_call(new)
    values |= _drawn([tensor for tensor in new if tensor.name not in by_call], FEW_IMAGES, rng)
    each = [_drawn([tensor for tensor in new if tensor.name in by_call], FEW_IMAGES, rng) for _ in range(loop.steps)]
    values |= {name: np.stack([draws[name] for draws in each], 1) for name in by_call}
    watched: dict[int, dict[str, Array]] = {index: {} for index in (0, loop.steps // 2, loop.steps - 1)}
    exact = _followed(loop, start.exact_outputs, step.exact_outputs, by_call, values, session, watched)
    plain = _followed(loop, start.plain_outputs, step.plain_outputs, by_call, values, session)
    ran = session.run(route, values)
    return {
        start.spec.name: [start.compared(about, session, values)],
        step.spec.name: [
            step.compared(about | {"step": index}, session, {name: v.astype(np.float32) for name, v in state.items()})
            for index, state in watched.items()
        ],
        f"{route} loop": [_Case(about, {name: (ran[name], exact[name], plain[name]) for name in exact})],
    }


def _few(images: Array) -> Array:
    """Those that go through a loop: each costs all of its calls three times."""
    return images[np.arange(FEW_IMAGES) % len(images)]


def _followed(
    loop: Loop,
    start: _Run,
    step: _Run,
    drawn: Sequence[str],
    values: dict[str, Array],
    session: Session,
    watched: dict[int, dict[str, Array]] | None = None,
) -> dict[str, Array]:
    """A loop by a reference; `watched` gets the inputs of those calls that it has already."""
    number = itertools.count()

    def call(given: Mapping[str, Array]) -> Mapping[str, Array]:
        if (index := next(number)) in (watched or ()):
            watched[index] = dict(given)  # type: ignore[index]
        return step(dict(given))

    def calls(first: dict[str, Array]) -> Iterator[Mapping[str, Array]]:
        rows = (row_of(loop.schedule, drawn, values, index) for index in range(loop.steps))
        return looped(call, Calls(loop.step, first, rows, loop.carry, loop.every.keys()))

    return follow(loop, values, start(values), calls, session.latent_shapes)


def _drawn(tensors: Sequence[TensorSpec], batch: int, rng: np.random.Generator) -> dict[str, Array]:
    """Values of what is random or set beside images and latents."""
    values: dict[str, Array] = {}
    for tensor in tensors:
        shape = (batch, *tensor.shape)
        if tensor.role == "noise":
            values[tensor.name] = rng.normal(size=shape).astype(np.float32)
        elif tensor.role == "uniform":
            values[tensor.name] = rng.uniform(size=shape).astype(np.float32)
        elif tensor.role in ("control", "grid"):
            values[tensor.name] = np.full(shape, tensor.default, np.float32)
    return values


def _round_trips(
    routes: Mapping[Route, str | Loop],
    pairs: Mapping[str, _Pair],
    session: Session,
    images: Array,
    cases: Mapping[str, Sequence[_Case]],
) -> Iterator[_Case]:
    """Images to latents, as the cases of `inverse` have found them already, and back."""
    forward, inverse = routes["forward"], routes["inverse"]
    known, sets = (
        (cases[inverse], _batches(images)) if isinstance(inverse, str) else (cases["inverse loop"], [_few(images)])
    )
    for chosen, case in zip(sets, known, strict=False):  # those with noise follow
        conditions = in_turn(session.conditions, range(len(chosen)))
        latents = {name: case.outputs[name] for name in session.input_shapes if name in case.outputs}
        back = session.run("forward", {name: found for name, (found, _, _) in latents.items()} | conditions)["image"]
        plain = {name: values for name, (_, _, values) in latents.items()} | conditions
        own = _by_torch(forward, pairs, plain, session)["image"]
        yield _Case({"batch": len(chosen)}, {"image": (back, chosen.astype(np.float64), own)})


def _by_torch(way: str | Loop, pairs: Mapping[str, _Pair], values: dict[str, Array], session: Session) -> Any:
    """The outputs of a route as torch finds them in float32; whatever is not given has its mean or its default."""
    graphs = [pairs[name] for name in graphs_of(way)]
    count = len(next(iter(values.values())))
    for tensor in session.manifest.graphs[graphs[0].spec.name].inputs:
        values.setdefault(tensor.name, given(tensor, values, count))
    if isinstance(way, str):
        return graphs[0].plain_outputs(values)
    start, step = graphs
    described = session.manifest.graphs[step.spec.name]
    drawn = drawn_by_call(described.inputs)
    values |= mean_draws(described, way.steps, values)
    for tensor in described.inputs:
        if tensor.role in ("control", "grid"):
            values.setdefault(tensor.name, given(tensor, values, count))
    return _followed(way, start.plain_outputs, step.plain_outputs, drawn, values, session)


def _latent_trip(session: Session, seed: int) -> dict[str, Any]:
    """Informative only: a latent list may hold more numbers than an image, and then this is not the identity."""
    latents = _latents(session, seed, 1, 0.7)
    conditions = {name: latents[name] for name in session.conditions}
    again = session.run("inverse", {"image": session.run("forward", latents)["image"], **conditions})
    found = {name: float(finite(np.abs(again[name] - latents[name])).max()) for name in session.latent_shapes}
    return {"path": "latents", "batch": 1, "max": found}


def _latents(session: Session, seed: int, batch: int, std: float) -> dict[str, Array]:
    """Latents of images 0 .. batch - 1 of `seed`, and the conditions beside them."""
    stds = dict.fromkeys(session.latent_shapes, std)
    return {**session.drawing.latents(seed, range(batch), stds), **in_turn(session.conditions, range(batch))}


def _batches(images: Array, draws: int | None = None) -> Iterator[Array]:
    """The first image alone, then every image, in batches of three, repeated where there are fewer.

    draws: seed of noise within their bins, as training adds it, with which they come twice more, because an output of
    one number an image has too few values otherwise.
    """
    yield images[:1]
    for start in range(0, max(len(images), BATCHES[1]), BATCHES[1]):
        yield images[np.arange(start, start + BATCHES[1]) % len(images)]
    if draws is None:
        return
    rng = np.random.default_rng([draws, 1])
    for start in range(0, 2 * max(len(images), BATCHES[1]), BATCHES[1]):
        chosen = images[np.arange(start, start + BATCHES[1]) % len(images)]
        yield np.clip(chosen + rng.uniform(-0.5, 0.5, chosen.shape) / 255, 0, 1).astype(np.float32)
