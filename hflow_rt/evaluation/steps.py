"""What each call of a model of many steps adds to the bound on bits per dimension, and a picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hflow_rt.data.selection import Selection
from hflow_rt.errors import ConfigError
from hflow_rt.evaluation.batches import Alone, Shares, Track, batches, silent
from hflow_rt.evaluation.bits import Pixels, pixels_of
from hflow_rt.evaluation.figures import Estimate
from hflow_rt.extras import needed
from hflow_rt.files import atomic_file
from hflow_rt.models.family import LatentModel
from hflow_rt.streams import generator

__all__ = ["StepBits", "bits_by_step", "chart"]

_STREAM = 1 << 16  # beyond the numbers of bounds, whose draws are others


@dataclass(frozen=True)
class StepBits:
    """Bits per dimension of every call of the network, in the order in which `forward` makes them."""

    calls: tuple[Estimate, ...]

    @property
    def total(self) -> float:
        """Of all calls; what the latents cost that `forward` starts from is not among it."""
        return sum(call.mean for call in self.calls)

    def dump(self) -> list[dict[str, Any]]:
        """As plain JSON values."""
        return [call.dump() for call in self.calls]

    def lines(self) -> list[str]:
        """What people read of it."""
        dearest = max(range(len(self.calls)), key=lambda index: self.calls[index].mean)
        most = f"most in call {dearest + 1}: {self.calls[dearest].mean:.3f}"
        return [f"{len(self.calls)} calls, each measured: {self.total:.3f} bits/dim, {most}"]


@torch.no_grad()
def bits_by_step(
    model: LatentModel,
    images: Pixels | Selection,
    seed: int = 0,
    batch: int = 32,
    shares: Shares | None = None,
    track: Track = silent,
) -> StepBits:
    """The bound call by call, with a draw of its own for every call and image; as many calls an image as the model has.

    Raises `ConfigError` for a model whose bound has no such parts.
    """
    shares, found = shares or Alone(), []
    device = next(model.parameters()).device
    for part in track("every step", shares.share(batches(len(images), batch))):
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_of(images, part))).to(device)
        costs = model.bits_by_step(pixels, [generator(seed, _STREAM, index) for index in part])
        if costs is None:
            raise ConfigError("the bound of this model has no steps to tell apart; omit --by-step")
        found.append(np.stack([cost.cpu().double().numpy() for cost in costs], axis=1))
    rows = np.concatenate(shares.collect(found))
    return StepBits(tuple(Estimate.of(column) for column in rows.T))


def chart(found: StepBits, path: Path) -> None:
    """A line over the calls, with their standard error, on a logarithmic axis.

    Raises `BackendUnavailable` without matplotlib.
    """
    with needed("matplotlib", "the chart needs matplotlib: pip install 'hflow-rt[bench]'"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    calls = np.arange(1, len(found.calls) + 1)
    means = np.array([call.mean for call in found.calls])
    errors = np.nan_to_num([call.standard_error for call in found.calls])
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.fill_between(calls, np.maximum(means - errors, means.min() / 2), means + errors, color="#2f6db5", alpha=0.25)
    axis.plot(calls, means, color="#2f6db5")
    if means.min() > 0:
        axis.set_yscale("log")
    axis.set_xlabel("call of the network, from the blurred start to the pixels", fontsize=8)
    axis.set_ylabel("bits/dim", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.set_title(f"{found.total:.3f} bits/dim in {len(found.calls)} calls", loc="left", fontsize=10)
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=110, metadata={"Software": "hflow-rt"})
