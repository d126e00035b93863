"""Is the engine the model? Every graph against the torch reference in float64, on the same inputs.

The tolerance is measured, not chosen. All values of one output, over all cases of its graph, are pooled, and three
statistics of their error (`STATISTICS`) may each be a factor above the same statistic of torch's own float32, plus what
rounding the output itself can do. Mixed precision has tolerances of its own.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hflow_rt.conditions import in_turn
from hflow_rt.errors import DataError
from hflow_rt.models.family import LOG_PROB, GraphSpec, LatentModel, Role, TensorSpec
from hflow_rt.runtime.noise import draw_latents
from hflow_rt.runtime.session import Session

__all__ = [
    "FACTORS",
    "FACTORS_OF_FEW",
    "MIXED",
    "STATISTICS",
    "STDS",
    "ULPS",
    "compare",
    "failures",
    "run_parity",
    "set_tolerances",
]

Array = NDArray[Any]

STATISTICS: dict[str, Callable[[Array], Any]] = {
    "rms": lambda error: np.sqrt(np.square(error).mean()),
    "p99.9": lambda error: np.quantile(error, 0.999),
    "max": lambda error: error.max(),
}
# A statistic of the engine's error may be so many times that of torch's. Of 200 right engines of little-trained models
# (benchmarks/results/parity_study.md) outputs of 1,000 values or more went up to 2.2 times in rms and 3.1 in the
# quantile, but to 5.6 in their maximum: one pixel of 36,864, in the very model that 4 times called wrong.
FACTORS = {"rms": 4.0, "p99.9": 4.0, "max": 12.0}
# Of fewer than FEW values the quantile is the maximum. They are mostly one sum an image, such as the log-probability,
# where the order of the terms decides for all: right engines went up to 4.0 times in rms and 3.8 in the maximum.
FEW = 1000
FACTORS_OF_FEW = {"rms": 8.0, "max": 12.0}
# And so many float32 ulps of the output's size above that, because torch may be exact by luck: where it was within one
# ulp, right engines were up to 4.8 off, in sums whose terms are larger than they are.
ULPS = 8.0
STDS = (0.5, 0.7, 1.0)
BATCHES = (1, 3)
DRAWS = 24  # in all at std 1, of a graph whose outputs are short vectors
# What float16 in the nets may cost; docs/tensorrt.md says what it does. of_scale: of the largest value of any output,
# and near zero the absolute part counts.
MIXED = {"image_psnr_db": 50.0, "round_trip_psnr_db": 60.0, "bits_per_dim": 0.005, "of_scale": 0.05, "absolute": 1e-3}
# Where torch float32 itself is off by half an 8-bit step the weights are too ill-conditioned to prove anything.
CONCLUSIVE = 0.5 / 255
ROUND_TRIP = "round_trip"  # in the report, beside the graphs
TRIP = "image -> latents -> image"
_HUGE = 1e30  # stands for NaN and infinity: JSON knows neither, and sums must stay finite


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
        exact, plain = self._run(self.exact, torch.float64, values), self.plain_outputs(values)
        return _Case(about, {name: (found[name], exact[name], plain[name]) for name in exact})

    def plain_outputs(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """What torch finds in float32."""
        return self._run(self.plain, torch.float32, values)

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
    for name, pair in pairs.items():
        if pair.takes("image"):
            progress(f"comparing {name}")
            cases[name] = list(_image_cases(pair, session, images, seed))
    others = [pair for name, pair in pairs.items() if name not in cases]
    if others:
        progress(f"comparing {', '.join(pair.spec.name for pair in others)}")
        cases |= _latent_cases(others, session, seed)
    report: dict[str, Any] = {
        "backend": session.backend,
        "reference": "torch float64",
        "factors": FACTORS,
        "factors_of_few": FACTORS_OF_FEW,
        "ulps": ULPS,
        **({"mixed": MIXED} if session.precision == "mixed" else {}),
        "graphs": {graph: [_told(case) for case in found] for graph, found in cases.items()},
        "pooled": {graph: _pooled(found) for graph, found in cases.items()},
    }
    forward, inverse = (pairs.get(model.routes().get(route, "")) for route in ("forward", "inverse"))
    if forward is not None and inverse is not None:
        progress("comparing round trips")
        trips = list(_round_trips(forward, session, images, cases[inverse.spec.name]))
        report[ROUND_TRIP] = [{"path": "image", **case.about, **_told(case)["outputs"]["image"]} for case in trips]
        report[ROUND_TRIP].append(_latent_trip(session, seed))
        report["pooled"][ROUND_TRIP] = _pooled(trips)
    set_tolerances(report)
    report["images"] = len(images)
    report["failures"] = failures(report) + [f"{name} was not compared" for name in graphs if not cases.get(name)]
    report["passed"] = not report["failures"]
    return report


def compare(found: Array, exact: Array, plain: Array, picture: bool = False) -> dict[str, Any]:
    """Errors of `found` against float64 `exact`, beside those of torch float32 `plain` and the size of `exact`."""
    error, own = (_finite(np.abs(values.astype(np.float64) - exact)) for values in (found, plain))
    size = _finite(np.abs(exact))
    scale = float(size.max())
    relative = error / np.maximum(size, 1e-6 * max(scale, 1 / _HUGE))
    entry: dict[str, Any] = {
        "max": float(error.max()),
        "mean": float(error.mean()),
        "rms": float(STATISTICS["rms"](error)),
        "p99.9": float(np.quantile(error, 0.999)),
        "relative_max": float(relative.max()),
        "relative_mean": float(relative.mean()),
        "relative_p99.9": float(np.quantile(relative, 0.999)),
        "nan": int(np.isnan(found).sum()),
        **{f"torch_float32_{name}": float(statistic(own)) for name, statistic in STATISTICS.items()},
        **{f"scale_{name}": float(statistic(size)) for name, statistic in STATISTICS.items()},
        "scale": scale,
        "elements": int(error.size),
    }
    if picture:
        entry["psnr_db"] = _psnr(error)
        entry["uint8_differs"] = float((np.rint(found * 255.0) != np.rint(exact * 255.0)).mean())
    return entry


def set_tolerances(report: Mapping[str, Any]) -> None:
    """Give every pooled output its `tolerance`, by statistic; in mixed precision of the largest error alone."""
    mixed = report.get("mixed")
    for outputs in report["pooled"].values():
        for entry in outputs.values():
            if mixed:
                entry["tolerance"] = {"max": mixed["of_scale"] * entry["scale"] + mixed["absolute"]}
            else:
                ulp = float(np.finfo(np.float32).eps)
                entry["tolerance"] = {
                    name: factor * entry[f"torch_float32_{name}"] + ULPS * ulp * entry[f"scale_{name}"]
                    for name, factor in (FACTORS if entry["elements"] >= FEW else FACTORS_OF_FEW).items()
                }


def failures(report: Mapping[str, Any]) -> list[str]:
    """One line for each output beyond a tolerance; comparing nothing is a failure, and so are NaN and infinity."""
    mixed = report.get("mixed")
    lines = list(_beyond_mixed(report, mixed)) if mixed else []
    for graph, outputs in report["pooled"].items():
        trip = graph == ROUND_TRIP
        for name, entry in outputs.items():
            where = TRIP if trip else f"{graph}.{name}"
            own = entry["torch_float32_max"]
            if entry["nan"]:
                lines.append(f"{where}: {entry['nan']} NaN")
            elif own >= _HUGE or (name == "image" and not trip and own > CONCLUSIVE):
                lines.append(f"{where}: not conclusive, torch float32 itself is off by {own:.3g}")
            elif not (trip and mixed):
                lines += _beyond(where, entry)
    if not any(report["pooled"].values()):
        lines.append("nothing was compared: the bundle has neither direction")
    return lines


def _beyond_mixed(report: Mapping[str, Any], mixed: Mapping[str, float]) -> Iterator[str]:
    """Cases whose images or bits per dimension are further off than mixed precision may be."""
    for graph, cases in report["graphs"].items():
        for case in cases:
            where = f"{graph} at batch {case['batch']}" + (f", std {case['std']}" if "std" in case else "")
            if not (bits := case.get("bits_per_dim_difference", 0)) <= mixed["bits_per_dim"]:
                yield f"{where}: bits/dim differ by {bits:.3g} above {mixed['bits_per_dim']}"
            for name, entry in case["outputs"].items():
                if not entry.get("psnr_db", math.inf) >= mixed["image_psnr_db"]:
                    yield f"{where}: {name} {entry['psnr_db']:.1f} dB below {mixed['image_psnr_db']}"
    for trip in report.get(ROUND_TRIP, []):
        if trip["path"] == "image" and not trip["psnr_db"] >= mixed["round_trip_psnr_db"]:
            yield f"{TRIP} at batch {trip['batch']}: {trip['psnr_db']:.1f} dB below {mixed['round_trip_psnr_db']}"


def _beyond(where: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """What of a pooled output is beyond its tolerance, the statistics in one line."""
    beyond = [
        f"{name} {entry[name]:.3g} above {limit:.3g}"
        for name, limit in entry["tolerance"].items()
        if not entry[name] <= limit
    ]
    if beyond:
        yield f"{where}: error {', '.join(beyond)}"


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


def _image_cases(pair: _Pair, session: Session, images: Array, seed: int) -> Iterator[_Case]:
    """A graph that takes images; whatever is random beside them differs in all values, which tells them apart."""
    rng = np.random.default_rng(seed)
    for chosen in _batches(images, seed):
        batch = len(chosen)
        values = {"image": chosen, **in_turn(session.choices, range(batch))}
        values |= _drawn(pair.spec.inputs, batch, rng)
        case = pair.compared({"batch": batch}, session, values)
        if not all(np.isfinite(plain).all() for _, _, plain in case.outputs.values()):
            raise DataError(
                "the model itself overflows on these images, in torch as in any engine: they are too far from what"
                " it was trained on; name images like those with --images"
            )
        if LOG_PROB in case.outputs:
            found, exact, _ = case.outputs[LOG_PROB]
            dimensions = chosen[0].size * math.log(2)
            case.about["bits_per_dim_difference"] = float(_finite(np.abs(found - exact)).max()) / dimensions
        yield case


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


def _drawn(tensors: Sequence[TensorSpec], batch: int, rng: np.random.Generator) -> dict[str, Array]:
    """Values of what is random or set beside images and latents."""
    values: dict[str, Array] = {}
    for tensor in tensors:
        shape = (batch, *tensor.shape)
        if tensor.role == "noise":
            values[tensor.name] = rng.normal(size=shape).astype(np.float32)
        elif tensor.role == "uniform":
            values[tensor.name] = rng.uniform(size=shape).astype(np.float32)
        elif tensor.role == "control":
            values[tensor.name] = np.full(shape, tensor.default, np.float32)
    return values


def _round_trips(forward: _Pair, session: Session, images: Array, inverse: Sequence[_Case]) -> Iterator[_Case]:
    """Images to latents, as `inverse` has found them already, and back."""
    for chosen, case in zip(_batches(images), inverse, strict=False):  # those with noise follow
        told = in_turn(session.choices, range(len(chosen)))
        latents = {name: case.outputs[name] for name in session.latent_shapes}
        back = session.forward({name: found for name, (found, _, _) in latents.items()} | told)
        own = forward.plain_outputs({name: plain for name, (_, _, plain) in latents.items()} | told)["image"]
        yield _Case({"batch": len(chosen)}, {"image": (back, chosen.astype(np.float64), own)})


def _latent_trip(session: Session, seed: int) -> dict[str, Any]:
    """Informative only: a latent list may hold more numbers than an image, and then this is not the identity."""
    latents = _latents(session, seed, 1, 0.7)
    told = {name: latents[name] for name in session.choices}
    again = session.inverse(session.forward(latents), told).latents
    found = {name: float(_finite(np.abs(again[name] - latents[name])).max()) for name in session.latent_shapes}
    return {"path": "latents", "batch": 1, "max": found}


def _latents(session: Session, seed: int, batch: int, std: float) -> dict[str, Array]:
    """Latents of images 0 .. batch - 1 of `seed`, and what the model is told beside them."""
    stds = dict.fromkeys(session.latent_shapes, std)
    drawn = draw_latents(session.latent_shapes, session.manifest.prior_std, seed, range(batch), stds)
    return {**drawn, **in_turn(session.choices, range(batch))}


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


def _finite(values: Array) -> Array:
    return np.nan_to_num(values, nan=_HUGE, posinf=_HUGE)


def _psnr(error: Array) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1; 999 stands for equal."""
    square = float(np.square(error).mean())
    return 999.0 if square == 0 else -10 * math.log10(square)
