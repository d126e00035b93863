"""The strict bound on the likelihood (spec 6): what a blurred image costs under the prior, plus all steps, plus pixels.

The prior is the mixture of normals of `delta` around the blurred images of the bank, which is what samples begin with.
Costs are in nats per image of uniformly dequantised data, float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hflow_rt.errors import DataError
from hflow_rt.models.family import TensorSpec
from hflow_rt.models.ihdm.bank import Waves
from hflow_rt.models.ihdm.blur import cosine_basis, damped, damping
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.plan import levels_of

if TYPE_CHECKING:
    from hflow_rt.models.ihdm.model import IHDM

__all__ = [
    "PARTS",
    "bits_per_dim",
    "bound_draws",
    "bound_terms",
    "level_cost",
    "mixture_cost",
    "parts",
    "pixel_cost",
    "start_cost",
    "step_cost",
    "uniformly",
]

PARTS = ("start.prior", "noise.steps", "residual.pixels")


def start_cost(model: IHDM, images: Tensor, starts: Tensor, delta: float) -> Tensor:
    """What the state at the last level costs under the prior, `[B]`: the closed form of the published bound.

    images: `[B, C, R, R]` in [0, 1]. starts: of the prior's images, `[n, C, M]`. Raises `DataError` if there are none.
    """
    if not len(starts):
        raise DataError("the prior is a mixture around training images, and the bank has none; give images")
    config, images = model.config, images.double()
    basis, last = (t.to(images) for t in (cosine_basis(config.resolution), damping(config)[-1]))
    return mixture_cost(config, damped(images, basis, last), starts.double(), Waves(config), delta)


def mixture_cost(config: IHDMConfig, blurred: Tensor, starts: Tensor, kept: Waves, delta: float) -> Tensor:
    """The same of images `[B, C, R, R]` at the last level, in their precision."""
    found = kept.coefficients(blurred)
    # waves are orthogonal, and each has the norm R; what they leave out is orthogonal to all of them
    apart = (found[:, None] - starts).square().flatten(2).sum(2) * config.resolution**2
    rest = (blurred - kept.rebuilt(found)).square().flatten(1).sum(1)
    ratio = config.sigma / delta
    constant = _values(config) * (ratio**2 - 1 - 2 * math.log(ratio))
    divergence = ((apart + rest[:, None]) / delta**2 + constant) / 2
    return math.log(len(starts)) - torch.logsumexp(-divergence, 1)


def step_cost(config: IHDMConfig, error: Tensor, delta: float) -> Tensor:
    """What a step from level 2 or above costs, given the squared error of its mean `[B]`."""
    ratio = config.sigma / delta
    return (error / delta**2 + _values(config) * (ratio**2 - 1 - 2 * math.log(ratio))) / 2


def pixel_cost(config: IHDMConfig, error: Tensor, delta: float) -> Tensor:
    """What the pixels cost given the state at level 1 and the squared error of its mean `[B]`."""
    return error / (2 * delta**2) + _values(config) * math.log(delta * math.sqrt(2 * math.pi))


def bits_per_dim(config: IHDMConfig, nats: Tensor) -> Tensor:
    """Nats per image, of a density on [0, 1], as bits per dimension."""
    return nats / (_values(config) * math.log(2)) + config.bits


def level_cost(model: IHDM, images: Tensor, level: int, noise: Tensor) -> Tensor:
    """What leaving a level costs in bits per dimension, `[B]`: the step to the next, from level 1 the pixels.

    images: `[B, C, R, R]` in [0, 1]. noise: standard normal, of the state at the level.
    """
    config = model.config
    error = model.errors(images, torch.full((len(images),), level, device=images.device), noise).double()
    if level == 1:
        return bits_per_dim(config, pixel_cost(config, error, config.delta))
    return step_cost(config, error, config.delta) / (_values(config) * math.log(2))


def bound_draws(config: IHDMConfig) -> tuple[TensorSpec, ...]:
    """What one draw of `bound_terms` takes beside the image."""
    return (
        TensorSpec("uniform", config.image_shape, "uniform", (0.0, 1.0)),
        TensorSpec("level", (), "uniform", (0.0, 1.0)),
        TensorSpec("noise", config.image_shape, "noise"),
        TensorSpec("pixel_noise", config.image_shape, "noise"),
    )


def bound_terms(model: IHDM, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bound in parts, float64 `[B]` each in bits per dimension: of the start, the steps, the pixels.

    One draw stands for all steps by one of them, K - 1 times, so that its mean over draws is the bound. inputs: the
    levels `image`, `[B, C, R, R]` in [0, 1], and `bound_draws`. Raises `DataError` for a model without a bank.
    """
    config = model.config
    like = model.network.head.weight
    x = uniformly(inputs["image"].to(like), inputs["uniform"].to(like), config.bits)
    level = levels_of(inputs["level"], config.steps - 1) + 1
    steps = model.errors(x, level, inputs["noise"].to(like)).double()
    pixels = model.errors(x, torch.ones_like(level), inputs["pixel_noise"].to(like)).double()
    start = start_cost(model, x, model.bank().get("start", x[:0]), config.delta)
    return parts(config, start, steps, pixels)


def parts(config: IHDMConfig, start: Tensor, steps: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """Bits per dimension by name, of the start's cost and of the errors of one step and of the pixels, `[B]` each."""
    unit = 1 / (_values(config) * math.log(2))
    found = (
        start * unit,
        step_cost(config, steps, config.delta) * (unit * (config.steps - 1)),
        bits_per_dim(config, pixel_cost(config, pixels, config.delta)),
    )
    return dict(zip(PARTS, found, strict=True))


def uniformly(image: Tensor, uniform: Tensor, bits: int) -> Tensor:
    """Levels in [0, 1] to where `uniform`, in [0, 1), is in the bins of levels, which are `2^-bits` wide."""
    bins = 1 << bits
    return (image * (bins - 1) + uniform) / bins


def _values(config: IHDMConfig) -> int:
    return math.prod(config.image_shape)
