"""What an engine's errors are measured by, and how large they may be.

The tolerance is measured, not chosen. All values of one output, over all cases of its graph, are pooled, and three
statistics of their error (`STATISTICS`) may each be a factor above the same statistic of torch's own float32, plus what
rounding the output itself can do. Mixed precision has tolerances of its own.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.choices import Precision

__all__ = [
    "FACTORS",
    "FACTORS_OF_FEW",
    "MIXED",
    "ROUND_TRIP",
    "STATISTICS",
    "ULPS",
    "compare",
    "criteria",
    "failures",
    "finite",
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
# What float16 in the nets may cost; docs/tensorrt.md says what it does. of_scale: of the largest value of any output,
# and near zero the absolute part counts.
MIXED = {"image_psnr_db": 50.0, "round_trip_psnr_db": 60.0, "bits_per_dim": 0.005, "of_scale": 0.05, "absolute": 1e-3}
# Where torch float32 itself is off by half an 8-bit step the weights are too ill-conditioned to prove anything.
CONCLUSIVE = 0.5 / 255
ROUND_TRIP = "round_trip"  # in the report, beside the graphs
TRIP = "image -> latents -> image"
_HUGE = 1e30  # stands for NaN and infinity: JSON knows neither, and sums must stay finite


def criteria(precision: Precision) -> dict[str, Any]:
    """What errors of engines in this precision are held against, as a report states it."""
    stated = {"factors": FACTORS, "factors_of_few": FACTORS_OF_FEW, "ulps": ULPS}
    return stated | ({"mixed": MIXED} if precision == "mixed" else {})


def compare(found: Array, exact: Array, plain: Array, picture: bool = False) -> dict[str, Any]:
    """Errors of `found` against float64 `exact`, beside those of torch float32 `plain` and the size of `exact`."""
    error, own = (finite(np.abs(values.astype(np.float64) - exact)) for values in (found, plain))
    size = finite(np.abs(exact))
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
        lines.append("nothing was compared: the bundle has neither route")
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


def finite(values: Array) -> Array:
    """NaN and infinity as one huge number."""
    return np.nan_to_num(values, nan=_HUGE, posinf=_HUGE)


def _psnr(error: Array) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1; 999 stands for equal."""
    square = float(np.square(error).mean())
    return 999.0 if square == 0 else -10 * math.log10(square)
