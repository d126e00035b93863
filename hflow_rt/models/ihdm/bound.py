"""The strict bound on the likelihood (spec 6): what a blurred image costs under the prior, plus all steps, plus pixels.

The prior is the mixture of normals of `delta` around the blurred images of the bank, which is what samples begin with.
Costs are in nats per image of uniformly dequantised data, float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hflow_rt.errors import DataError
from hflow_rt.models.family import TensorSpec
from hflow_rt.models.ihdm.bank import coefficients, rebuilt, waves
from hflow_rt.models.ihdm.blur import cosine_basis, damped, damping
from hflow_rt.models.ihdm.model import IHDM, levels_of

__all__ = ["bits_per_dim", "bound_draws", "bound_terms", "level_costs", "pixel_cost", "start_cost", "step_cost"]


def start_cost(model: IHDM, images: Tensor, starts: Tensor, delta: float) -> Tensor:
    """What the state at the last level costs under the prior, `[B]`: the closed form of the published bound.

    images: `[B, C, R, R]` in [0, 1]. starts: of the prior's images, `[n, C, M]`. Raises `DataError` if there are none.
    """
    if not len(starts):
        raise DataError("the prior is a mixture around training images, and the bank has none; give images")
    config, images = model.config, images.double()
    kept, basis, last = (t.to(images) for t in (waves(config), cosine_basis(config.resolution), damping(config)[-1]))
    blurred = damped(images, basis, last)
    found = coefficients(blurred, kept)
    # waves are orthogonal, and each has the norm R; what they leave out is orthogonal to all of them
    apart = torch.cdist(found.flatten(1), starts.double().flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    rest = (blurred - rebuilt(found, kept)).square().flatten(1).sum(1)
    squared = config.resolution**2 * apart.square() + rest[:, None]
    ratio = config.sigma / delta
    divergence = (squared / delta**2 + _values(model) * (ratio**2 - 1 - 2 * math.log(ratio))) / 2
    return math.log(len(starts)) - torch.logsumexp(-divergence, 1)


def step_cost(model: IHDM, error: Tensor, delta: float) -> Tensor:
    """What a step from level 2 or above costs, given the squared error of its mean `[B]`."""
    ratio = model.config.sigma / delta
    return (error.double() / delta**2 + _values(model) * (ratio**2 - 1 - 2 * math.log(ratio))) / 2


def pixel_cost(model: IHDM, error: Tensor, delta: float) -> Tensor:
    """What the pixels cost given the state at level 1 and the squared error of its mean `[B]`."""
    return error.double() / (2 * delta**2) + _values(model) * math.log(delta * math.sqrt(2 * math.pi))


def bits_per_dim(model: IHDM, nats: Tensor) -> Tensor:
    """Nats per image, of a density on [0, 1], as bits per dimension."""
    return nats / (_values(model) * math.log(2)) + model.config.bits


def level_costs(model: IHDM, images: Tensor, draws: Tensor) -> Tensor:
    """Cost of the pixels, then of the steps from levels 2 to K, `[B, K]`: all of the bound but the start.

    draws: standard normal, `[B, K, C, R, R]`, for the states of levels 1 to K.
    """
    costs, delta = [], model.config.delta
    for k in range(1, model.config.steps + 1):
        level = torch.full((len(images),), k, device=images.device)
        error = model.errors(images, level, draws[:, k - 1])
        costs.append((step_cost if k > 1 else pixel_cost)(model, error, delta))
    return torch.stack(costs, 1)


def bound_draws(model: IHDM) -> dict[str, TensorSpec]:
    """What one draw of `bound_terms` takes beside the image."""
    shape = model.config.image_shape
    return {
        "uniform": TensorSpec("uniform", shape, "uniform", (0.0, 1.0)),
        "level": TensorSpec("level", (), "uniform", (0.0, 1.0)),
        "noise": TensorSpec("noise", shape, "noise"),
        "pixel_noise": TensorSpec("pixel_noise", shape, "noise"),
    }


def bound_terms(model: IHDM, image: Tensor, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bound in parts, `[B]` each in bits per dimension: of the start, the steps, the pixels.

    One draw stands for all steps by one of them, K - 1 times, so that its mean over draws is the bound. image: levels
    `[B, C, R, R]` in [0, 1]. draws: see `bound_draws`.
    """
    config, unit = model.config, 1 / (_values(model) * math.log(2))
    bins = 1 << config.bits
    x = (image * (bins - 1) + draws["uniform"].to(image)) / bins
    level = levels_of(draws["level"], config.steps - 1) + 1
    steps = model.errors(x, level, draws["noise"].to(x))
    pixels = model.errors(x, torch.ones_like(level), draws["pixel_noise"].to(x))
    bank = model.bank().get("start", x.new_zeros(0, *model.start_shape))
    return {
        "start.prior": start_cost(model, x, bank, config.delta) * unit,
        "noise.steps": step_cost(model, steps, config.delta) * (unit * (config.steps - 1)),
        "residual.pixels": bits_per_dim(model, pixel_cost(model, pixels, config.delta)),
    }


def _values(model: IHDM) -> int:
    return math.prod(model.config.image_shape)
