"""What a distance needs to know of a set of images in the features of a network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError

__all__ = ["MAX_ROWS", "Statistics", "need_two", "statistics"]

# Rows kept for the kernel distance, evenly spaced: 2048 features of so many images are 82 MB.
MAX_ROWS = 10_000


@dataclass(frozen=True)
class Statistics:
    """Features of `n` images: mean `[D]` and covariance `[D, D]` in float64, and up to `MAX_ROWS` rows `[m, D]`."""

    n: int
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    rows: NDArray[np.float32]

    @property
    def dimensions(self) -> int:
        """Features an image."""
        return len(self.mean)


def need_two(count: int, what: str) -> None:
    """Raise `DataError` for fewer than two images of `what`, which have no covariance."""
    if count < 2:
        raise DataError(f"a distance needs at least 2 images on either side; found {count} of {what}")


def statistics(features: NDArray[np.float32], what: str) -> Statistics:
    """Of features `[n, D]`; `what` names the images. Raises `DataError` for fewer than two, and for NaN or infinity."""
    need_two(len(features), what)
    broken = int((~np.isfinite(features).all(1)).sum())
    if broken:
        raise DataError(
            f"the features of {broken} of {len(features)} images of {what} are NaN or infinite; "
            "check the feature network and how it wants its images"
        )
    exact = features.astype(np.float64)
    kept = np.linspace(0, len(features) - 1, min(len(features), MAX_ROWS)).round().astype(np.int64)
    covariance = np.atleast_2d(np.cov(exact, rowvar=False))
    return Statistics(len(features), exact.mean(0), covariance, np.ascontiguousarray(features[kept]))
