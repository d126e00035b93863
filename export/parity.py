"""Is the engine the model? Every graph against the torch reference in float64, on the same inputs.

The tolerance is measured, not chosen: an engine may be at most `FACTOR` times as far from float64 as torch's own
float32 is on these inputs, plus one part in a million of the output's scale. Mixed precision has bounds of its own.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.conditions import in_turn
from hflow_rt.errors import DataError
from hflow_rt.models.family import GraphSpec, LatentModel
from hflow_rt.runtime.noise import draw_latents
from hflow_rt.runtime.session import Session

__all__ = ["FACTOR", "MIXED", "STDS", "compare", "failures", "run_parity"]

FACTOR = 4.0
STDS = (0.5, 0.7, 1.0)
BATCHES = (1, 3)
# What float16 in the nets may cost; docs/tensorrt.md says what it does. of_scale: of the largest value of any output,
# and near zero the absolute part counts.
MIXED = {"image_psnr_db": 50.0, "round_trip_psnr_db": 60.0, "bits_per_dim": 0.005, "of_scale": 0.05, "absolute": 1e-3}
# Where torch float32 itself is off by half an 8-bit step the weights are too ill-conditioned to prove anything.
CONCLUSIVE = 0.5 / 255
Array = NDArray[Any]


def run_parity(
    model: LatentModel,
    session: Session,
    images: Array,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compare every direction the bundle has; returns a JSON-ready report with `passed`.

    images: float32 `[N, 3, R, R]` in [0, 1], N at least 1. Raises `DataError` if there is nothing to compare.
    """
    if len(images) < 1:
        raise DataError("parity needs at least one image")
    reference, single = _double(model), model.float().eval()
    names = list(session.latent_shapes)
    report: dict[str, Any] = {
        "backend": session.backend,
        "reference": "torch float64",
        "factor": FACTOR,
        **({"mixed": MIXED} if session.precision == "mixed" else {}),
        "graphs": {},
    }
    graphs = session.graphs

    if "forward" in graphs:
        progress("forward: latents to image")
        report["graphs"]["forward"] = []
        for batch in BATCHES:
            for std in STDS:
                stds = dict.fromkeys(names, std)
                latents = draw_latents(session.latent_shapes, session.manifest.prior_std, seed, range(batch), stds)
                latents |= in_turn(session.choices, range(batch))
                exact, plain = _decode(reference, latents), _decode(single, latents)
                outputs = {"image": compare(session.forward(latents), exact, plain, picture=True)}
                report["graphs"]["forward"].append({"batch": batch, "std": std, "outputs": outputs})
    if "inverse" in graphs:
        progress("inverse: image to latents")
        report["graphs"]["inverse"] = []
        for chosen in _batches(images):
            batch = len(chosen)
            told = in_turn(session.choices, range(batch))
            exact_all, plain_all = _encode(reference, chosen, told), _encode(single, chosen, told)
            if not all(np.isfinite(values).all() for values in plain_all.values()):
                raise DataError(
                    "the model itself overflows on these images, in torch as in any engine: they are too far from what"
                    " it was trained on; name images like those with --images"
                )
            encoded = session.inverse(chosen, told)
            found = {**{name: encoded.latents[name] for name in names}, "log_prob": encoded.log_prob}
            outputs = {name: compare(found[name], exact_all[name], plain_all[name]) for name in found}
            dimensions = chosen[0].size * math.log(2)
            bits = float(np.abs(found["log_prob"] - exact_all["log_prob"]).max()) / dimensions
            report["graphs"]["inverse"].append({"batch": batch, "bits_per_dim_difference": bits, "outputs": outputs})
    if "bound" in graphs:
        progress("bound: image and noise to bits/dim")
        report["graphs"]["bound"] = list(_bound_cases(reference, single, session, images, seed))
    inner = {name: spec for name, spec in model.graphs().items() if name in graphs and name not in report["graphs"]}
    if inner:
        progress(f"inner graphs: {', '.join(inner)}")
        report["graphs"] |= _inner_graphs(inner, session, seed)
    if "forward" in graphs and "inverse" in graphs:
        progress("round trips")
        report["round_trip"] = list(_round_trips(single, session, images, names, seed))
    _set_bounds(report)
    report["images"] = len(images)
    report["failures"] = failures(report) + [
        f"{name} was not compared" for name in graphs if name not in report["graphs"]
    ]
    report["passed"] = not report["failures"]
    return report


def compare(found: Array, exact: Array, plain: Array, picture: bool = False) -> dict[str, Any]:
    """Errors of `found` against float64 `exact`, beside those of torch float32 `plain`."""
    error = np.abs(found.astype(np.float64) - exact)
    own = float(np.abs(plain.astype(np.float64) - exact).max())
    nan = int(np.isnan(found).sum())
    error = np.nan_to_num(error, nan=1e30, posinf=1e30)  # JSON knows neither, and sums must stay finite
    scale = float(np.abs(exact).max())
    relative = error / np.maximum(np.abs(exact), 1e-6 * max(scale, 1e-30))
    entry: dict[str, Any] = {
        "max": float(error.max()),
        "mean": float(error.mean()),
        "p99.9": float(np.quantile(error, 0.999)),
        "relative_max": float(relative.max()),
        "relative_mean": float(relative.mean()),
        "relative_p99.9": float(np.quantile(relative, 0.999)),
        "nan": nan,
        "torch_float32_max": own,
        "scale": scale,
        "elements": int(error.size),
    }
    if picture:
        entry["psnr_db"] = _psnr(error)
        entry["uint8_differs"] = float((np.rint(found * 255.0) != np.rint(exact * 255.0)).mean())
    return entry


def _set_bounds(report: Mapping[str, Any]) -> None:
    """Bound each output by what torch float32 does over all cases of its graph: one case may be exact by luck."""
    mixed = report.get("mixed")
    for cases in report["graphs"].values():
        for name in cases[0]["outputs"]:
            entries = [case["outputs"][name] for case in cases]
            own = max(entry["torch_float32_max"] for entry in entries)
            scale = max(entry["scale"] for entry in entries)
            for entry in entries:
                plain = FACTOR * own + 1e-6 * entry["scale"]
                entry["bound"] = mixed["of_scale"] * scale + mixed["absolute"] if mixed else plain


def failures(report: Mapping[str, Any]) -> list[str]:
    """One line for each output beyond its bound; comparing nothing is a failure, and so is NaN."""
    lines = []
    mixed = report.get("mixed")
    for graph, cases in report["graphs"].items():
        for case in cases:
            if mixed and not case.get("bits_per_dim_difference", 0) <= mixed["bits_per_dim"]:
                found = f"{case['bits_per_dim_difference']:.3g} above {mixed['bits_per_dim']}"
                lines.append(f"{graph} at batch {case['batch']}: bits/dim differ by {found}")
            for name, entry in case["outputs"].items():
                where = f"{graph}.{name} at batch {case['batch']}" + (f", std {case['std']}" if "std" in case else "")
                if entry["nan"]:
                    lines.append(f"{where}: {entry['nan']} NaN")
                elif name == "image" and entry["torch_float32_max"] > CONCLUSIVE:
                    own = entry["torch_float32_max"]
                    lines.append(f"{where}: not conclusive, torch float32 itself is off by {own:.3g}")
                elif mixed and not entry.get("psnr_db", math.inf) >= mixed["image_psnr_db"]:
                    lines.append(f"{where}: {entry['psnr_db']:.1f} dB below {mixed['image_psnr_db']}")
                elif not entry["max"] <= entry["bound"]:
                    lines.append(f"{where}: error {entry['max']:.3g} above {entry['bound']:.3g}")
    for trip in report.get("round_trip", []):
        if trip["path"] != "image":
            continue
        where = f"image -> latents -> image at batch {trip['batch']}"
        if mixed:
            if not trip["psnr_db"] >= mixed["round_trip_psnr_db"]:
                lines.append(f"{where}: {trip['psnr_db']:.1f} dB below {mixed['round_trip_psnr_db']}")
        elif not trip["max"] <= trip["bound"]:
            lines.append(f"{where}: error {trip['max']:.3g} above {trip['bound']:.3g}")
    if not any(cases for cases in report["graphs"].values()):
        lines.append("nothing was compared: the bundle has neither direction")
    return lines


def _batches(images: Array) -> Iterator[Array]:
    """The first image alone, then every image, in batches of three, repeated where there are fewer."""
    yield images[:1]
    for start in range(0, max(len(images), BATCHES[1]), BATCHES[1]):
        yield images[np.arange(start, start + BATCHES[1]) % len(images)]


def _bound_cases(
    reference: LatentModel, single: LatentModel, session: Session, images: Array, seed: int
) -> Iterator[dict[str, Any]]:
    """The graph `bound` at noise that differs in all inputs, which tells them apart as neither bound would."""
    rng = np.random.default_rng(seed)
    for chosen in _batches(images):
        values = {
            tensor.name: rng.normal(size=shape) if tensor.range is None else rng.uniform(*tensor.range, size=shape)
            for tensor in session.manifest.graphs["bound"].inputs
            for shape in [(len(chosen), *tensor.shape)]
        }
        inputs = {name: value.astype(np.float32) for name, value in values.items()} | {"image": chosen}
        found, exact, plain = session.run_graph("bound", inputs), _terms(reference, inputs), _terms(single, inputs)
        outputs = {name: compare(found[name], exact[name], plain[name]) for name in exact}
        yield {"batch": len(chosen), "outputs": outputs}


def _inner_graphs(specs: Mapping[str, GraphSpec], session: Session, seed: int) -> dict[str, Any]:
    """Graphs between latents and other spaces, against their own folded modules in float64.

    That folding itself is right shows in `forward` and `inverse`, which contain them. Into a space go prior latents;
    back come the values that float64 found there, for others would be far from any the model knows.
    """
    report: dict[str, Any] = {name: [] for pair in session.manifest.spaces.values() for name in pair}
    for batch in BATCHES:
        stds = dict.fromkeys(session.latent_shapes, 1.0)
        values = draw_latents(session.latent_shapes, session.manifest.prior_std, seed, range(batch), stds)
        values |= in_turn(session.choices, range(batch))
        for name in report:
            spec = specs[name]
            tensors = [torch.from_numpy(values[tensor.name]) for tensor in spec.inputs]
            with torch.no_grad():
                exact = copy.deepcopy(spec.module).double().eval()(*[tensor.double() for tensor in tensors])
                plain = spec.module.eval()(*tensors)
            found = session.run_graph(name, values)
            expected = {tensor.name: value.numpy() for tensor, value in zip(spec.outputs, exact, strict=True)}
            outputs = {
                output: compare(found[output], expected[output], value.numpy())
                for output, value in zip(expected, plain, strict=True)
            }
            report[name].append({"batch": batch, "outputs": outputs})
            values = values | {output: value.astype(np.float32) for output, value in expected.items()}
    return report


def _round_trips(
    single: LatentModel, session: Session, images: Array, names: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    for chosen in _batches(images):
        batch = len(chosen)
        told = in_turn(session.choices, range(batch))
        back = session.forward(session.inverse(chosen, told).latents)
        own_latents = _encode(single, chosen, told)
        own = float(np.abs(_decode(single, {name: own_latents[name] for name in names} | told) - chosen).max())
        error = np.abs(back.astype(np.float64) - chosen)
        differs = float((np.rint(back * 255.0) != np.rint(chosen * 255.0)).mean())
        yield {
            "path": "image",
            "batch": batch,
            "max": float(error.max()),
            "psnr_db": _psnr(error),
            "uint8_differs": differs,
            "torch_float32_max": own,
            "bound": FACTOR * own + 1e-6,
        }
    # informative only: a latent list may hold more numbers than an image, and then this is not the identity
    stds = dict.fromkeys(names, 0.7)
    latents = draw_latents(session.latent_shapes, session.manifest.prior_std, seed, range(1), stds)
    told = in_turn(session.choices, range(1))
    again = session.inverse(session.forward(latents | told), told).latents
    yield {
        "path": "latents",
        "batch": 1,
        "max": {n: float(np.abs(again[n] - latents[n]).max()) for n in names},
    }


def _psnr(error: Array) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1; 999 stands for equal."""
    square = float(np.square(error).mean())
    return 999.0 if square == 0 else -10 * math.log10(square)


def _double(model: LatentModel) -> LatentModel:
    return copy.deepcopy(model).double().eval()


def _dtype(model: LatentModel) -> torch.dtype:
    return next(model.parameters()).dtype


@torch.no_grad()
def _decode(model: LatentModel, latents: Mapping[str, Array]) -> Array:
    found: Array = model.decode({n: torch.from_numpy(v).to(_dtype(model)) for n, v in latents.items()}).numpy()
    return found


@torch.no_grad()
def _encode(model: LatentModel, images: Array, told: Mapping[str, Array]) -> dict[str, Array]:
    given = {name: torch.from_numpy(value).to(_dtype(model)) for name, value in told.items()}
    encoding = model.encode(torch.from_numpy(images).to(_dtype(model)), given)
    return {**{n: v.numpy() for n, v in encoding.latents.items()}, "log_prob": encoding.log_prob.numpy()}


@torch.no_grad()
def _terms(model: LatentModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
    found = model.bound_terms({name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in found.items()}
