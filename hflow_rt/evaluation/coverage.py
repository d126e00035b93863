"""How many samples look like data, and how much of the data they cover (Kynkäänniemi et al., NeurIPS 2019); copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["NEIGHBOURS", "Likeness", "likeness", "shares_within"]

NEIGHBOURS = 3
_AT_ONCE = 1000  # rows: their distances to 10,000 others are 40 MB


class Likeness(NamedTuple):
    """Cosines of images with what is most like each in the data; a copy is at 1."""

    median: float
    largest: float


def likeness(data: NDArray[np.float32], images: NDArray[np.float32]) -> Likeness:
    """How like the data images `[n, D]` are, each by the one that is most like it, in features `[m, D]`."""
    real, found = (torch.nn.functional.normalize(torch.from_numpy(rows)) for rows in (data, images))
    cosines = torch.cat([(part @ real.T).amax(1) for part in torch.split(found, _AT_ONCE)])
    return Likeness(float(cosines.quantile(0.5)), float(cosines.max()))


def shares_within(data: NDArray[np.float32], samples: NDArray[np.float32]) -> tuple[float, float] | None:
    """Precision and recall: the share of samples among the data, and of data among the samples, in features `[n, D]`.

    One is among others if it is as near to one of them as that is to its third neighbour. None for fewer than five.
    """
    if min(len(data), len(samples)) <= NEIGHBOURS + 1:
        return None
    real, fake = torch.from_numpy(data), torch.from_numpy(samples)
    return _share(fake, real), _share(real, fake)


def _share(rows: torch.Tensor, others: torch.Tensor) -> float:
    radii = torch.cat(
        [_distances(part, others).kthvalue(NEIGHBOURS + 1).values for part in torch.split(others, _AT_ONCE)]
    )
    inside = [(_distances(part, others) <= radii).any(1) for part in torch.split(rows, _AT_ONCE)]
    return float(torch.cat(inside).float().mean())


def _distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`[n, m]`, exact where rows are equal, which a product of matrices is not."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
