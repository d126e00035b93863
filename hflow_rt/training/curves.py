"""What a run logged while it trained, as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError
from hflow_rt.extras import needed
from hflow_rt.files import atomic_file
from hflow_rt.runs import TENSORBOARD

__all__ = ["Curve", "draw_curves", "panel_of", "read_curves"]

_POINTS = 250  # of a line, at most; more are averaged
_COLUMNS = 3
_LARGEST_RATIO = 30.0  # of values in a panel, before its axis is logarithmic
# one panel for all phases: their tags end so
_SHARED = ("loss", "gradient_norm")


@dataclass(frozen=True)
class Curve:
    """images: seen at each point, `[N]`. values: `[N]` float64."""

    images: NDArray[np.int64]
    values: NDArray[np.float64]


def read_curves(run: Path) -> dict[str, Curve]:
    """Curves of a run by tag, without what a resumed training left behind. Raises `DataError` where none is."""
    with needed("tensorboard", "reading a run's log needs tensorboard: pip install 'hflow-rt[train]'"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    open_log: Any = EventAccumulator
    events = open_log(str(run / TENSORBOARD), size_guidance={"scalars": 0})
    if (run / TENSORBOARD).is_dir():
        events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        values = np.array([point.value for point in points], np.float64)
        found[tag] = Curve(np.array([point.step for point in points], np.int64), values)
    if not found:
        raise DataError(f"{run} has no log to draw; a training writes it to {run / TENSORBOARD}")
    return found


def panel_of(tag: str) -> tuple[str, str]:
    """The panel that a curve belongs to, and its name there."""
    head, _, last = tag.rpartition("/")
    if last in _SHARED:
        return last, head or "model"
    if head in ("", "samples"):  # each in units of its own
        return tag, last
    return head, last


def draw_curves(curves: Mapping[str, Curve], path: Path, title: str) -> list[str]:
    """Draw a panel for curves that belong together; their names. Raises `BackendUnavailable` without matplotlib."""
    with needed("matplotlib", "the picture needs matplotlib: pip install 'hflow-rt[bench]'"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    panels: dict[str, dict[str, Curve]] = {}
    for tag in sorted(curves, key=lambda tag: ("samples" not in tag, "bits" not in tag, "loss" not in tag, tag)):
        panel, name = panel_of(tag)
        panels.setdefault(panel, {})[name] = curves[tag]
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (panel, lines) in zip(axes, panels.items(), strict=False):
        for name, curve in lines.items():
            images, values = _averaged(curve)
            axis.plot(images, values, label=name, linewidth=1, marker="o" if len(images) < 30 else None, markersize=3)
        seen = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in lines.values()])
        if len(seen) and seen.min() > 0 and seen.max() / seen.min() > _LARGEST_RATIO:
            axis.set_yscale("log")
        (name, *others) = lines
        alone = panel if others or panel.endswith(name) else f"{panel}/{name}"
        axis.set_title(alone.replace("_", " "), loc="left", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=100, metadata={"Software": "hflow-rt"})
    return list(panels)


def _averaged(curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `_POINTS` points, each the mean of those that follow one another."""
    count = min(len(curve.values), _POINTS)
    parts = [np.array_split(array, count) for array in (curve.images, curve.values)]
    images, values = (np.array([part.mean() for part in each]) for each in parts)
    return images, values
