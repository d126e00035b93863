"""The strict bound on the likelihood (spec 6), in nats per image of uniformly dequantised data.

`total = start + steps[2..K] + pixels`: what the blurred image costs under the prior, what every step costs, and what
the pixels cost given the image at level 1. The prior is the mixture of normals of `delta` around blurred training
images, so its part is the mean over test images of `start_cost`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hflow_rt.errors import DataError
from hflow_rt.models.ihdm.model import IHDM

__all__ = ["bits_per_dim", "pixel_cost", "start_cost", "step_cost"]


def start_cost(model: IHDM, images: Tensor, training: Iterable[Tensor], delta: float) -> Tensor:
    """What the last level's state costs under the prior, float64 `[B]`.

    images: `[B, C, R, R]`. training: batches of every training image, likewise in [0, 1]. The closed form of the
    published variational bound. Raises `DataError` if there is no training image.
    """
    config = model.config
    last = config.steps
    test = model.blur(images.double(), last).flatten(1)
    values, ratio = test.shape[1], config.sigma / delta
    constant = values * (ratio**2 - 1 - 2 * math.log(ratio))
    log_sum = torch.full((len(test),), -math.inf, dtype=torch.float64, device=test.device)
    count = 0
    for batch in training:
        train = model.blur(batch.double(), last).flatten(1)
        # as one product; what float64 loses by it is far below a nat
        squared = (test.square().sum(1)[:, None] + train.square().sum(1) - 2 * test @ train.T).clamp(min=0)
        divergence = (constant + squared / delta**2) / 2
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(-divergence, 1))
        count += len(train)
    if not count:
        raise DataError("the prior needs training images; none were given")
    return math.log(count) - log_sum


def step_cost(model: IHDM, error: Tensor, delta: float) -> Tensor:
    """What a step from level 2 or above costs, given the squared error of its mean `[B]`, float64."""
    ratio = model.config.sigma / delta
    return (error.double() / delta**2 + _values(model) * (ratio**2 - 1 - 2 * math.log(ratio))) / 2


def pixel_cost(model: IHDM, error: Tensor, delta: float) -> Tensor:
    """What the pixels cost given the state at level 1 and the squared error of its mean `[B]`, float64."""
    return error.double() / (2 * delta**2) + _values(model) * math.log(delta * math.sqrt(2 * math.pi))


def bits_per_dim(model: IHDM, nats: Tensor) -> Tensor:
    """Nats per image, of a density on [0, 1], as bits per dimension."""
    return nats / (_values(model) * math.log(2)) + model.config.bits


def _values(model: IHDM) -> int:
    return math.prod(model.config.image_shape)
