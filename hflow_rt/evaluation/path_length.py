"""Perceptual path length (Karras et al., CVPR 2019): how much images change along a path between two samples.

It is the squared distance of features over a small step, a squared step; the smaller, the more evenly a space is laid
out. torchmetrics measures it too, of generators of one tensor in LPIPS alone, whose weights are a download.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.errors import DataError
from hflow_rt.evaluation.batches import Alone, Shares, Track, batches, silent
from hflow_rt.evaluation.perception import Perception
from hflow_rt.limits import check_count

__all__ = ["STEP", "PathLength", "path_length", "trimmed"]

STEP = 1e-4  # of the way from one sample to the other, as the original's
_OUTLIERS = 1.0  # percent at either end, which a mean would be made of

Array = NDArray[np.float32]
# the images `[n, C, R, R]` in [0, 1] of so many pairs of samples: the first of each, and `STEP` of the way to the other
Stepped = Callable[[range], tuple[Array, Array]]


class PathLength(NamedTuple):
    """Mean over the pairs that are no outliers, of `pairs` in all, through `space`."""

    mean: float
    pairs: int
    space: str

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self._asdict()


def path_length(
    stepped: Stepped,
    space: str,
    seen: Perception,
    device: torch.device,
    pairs: int,
    batch: int = 32,
    shares: Shares | None = None,
    track: Track = silent,
) -> PathLength:
    """Of `pairs` pairs; the same however many processes share the work.

    Raises `DataError` for fewer than one pair, and for images that are not finite.
    """
    check_count("the number of pairs", pairs)
    shares = shares or Alone()

    @torch.inference_mode()
    def lengths(part: range) -> NDArray[np.float64]:
        first, second = (seen(torch.from_numpy(images).to(device)) for images in stepped(part))
        off = [(a.double() - b).square().flatten(1).sum(1) for a, b in zip(first, second, strict=True)]
        return torch.stack(off).sum(0).cpu().numpy() / STEP**2

    mine = [lengths(part) for part in track("pairs", shares.share(batches(pairs, batch)))]
    found = np.concatenate(shares.collect(mine))
    if not np.isfinite(found).all():
        raise DataError("path lengths must be finite; found NaN or infinity; check the model")
    return PathLength(float(trimmed(found).mean()), pairs, space)


def trimmed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those between the first and the last percent, both included."""
    low = np.percentile(values, _OUTLIERS, method="lower")
    high = np.percentile(values, 100 - _OUTLIERS, method="higher")
    return values[(low <= values) & (values <= high)]
