"""How unlike images are to the eye: features of a network at several depths, and pixels; differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hflow_rt.evaluation.perception import perception

__all__ = ["unlikeness"]

# Without pixels colours drift, with them alone images blur. On emoji both parts begin at about the same size so.
_PIXELS = 10.0


def unlikeness(features: str, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Distances `[B]` from targets `[B, C, R, R]` in [0, 1], of images of the same shape, which need not be within it.

    features: as of `perception`. Raises `ConfigError`, `DataError` and `BackendUnavailable`.
    """
    network = perception(features, targets.shape[-1], targets.device)
    with torch.no_grad():
        wanted = network(targets)

    def distance(images: Tensor) -> Tensor:
        parts = [(found - of).square().flatten(1).sum(1) for found, of in zip(network(images), wanted, strict=True)]
        pixels = (images - targets).square().flatten(1).mean(1)
        return torch.stack(parts).sum(0) + _PIXELS * pixels

    return distance
