"""The likelihood of pixels under mixtures of logistics in the bins of levels, in one pass (nvae spec 4.2, 12 H).

    log p = logsumexp_m( log softmax(weights)_m + sum over colours of the log mass of the level under logistic m )

Masses are exact without cancellation:

    log(sigmoid(u) - sigmoid(l)) = log(1 - exp(l - u)) - softplus(-u) - softplus(l)

A lane owns a pixel and goes over its logistics, so nothing between parameters and result is written. The gradient
recomputes the masses, and weighs logistics by the very sums of the result: of a pixel in far tails of narrow logistics
terms are thousands, and what is lost of a logarithm of their sum is lost of its weight.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import operator, takes
from hflow_rt.kernels.mixture_kernels import (
    BOTTOM,
    PUBLISHED_LOG_MASS,
    SMALLEST_LOG_SCALE,
    backward_triton,
    check,
    log_prob_triton,
    parameters_of,
    top_of,
)
from hflow_rt.kernels.moments import statistics_dtype

__all__ = ["Logistics", "logistics", "mixture_log_prob", "mixture_log_prob_reference", "sums_of"]


def mixture_log_prob(logits: Tensor, image: Tensor, bits: int, published: bool = False) -> Tensor:
    """Nats of every pixel, colours joined, `[B, H, W]`, float32 at least.

    logits: `[B, M (1 + 3 C) (3 C: 9), H, W]`: M weights, then for each colour M means, M logarithms of scales and, of
    colour images, M coefficients by which a colour's mean depends on colours before it. image: `[B, C, H, W]` in
    [0, 1], at levels of so many bits; C is 3 or 1. published: the top level begins at 0.99 of [-1, 1], and masses below
    1e-5 are approximated by the density.
    """
    if takes(logits) and not image.requires_grad:
        found: Tensor = _log_prob(logits, image, bits, published)[0]
        return found
    return mixture_log_prob_reference(logits, image, bits, published)


# -- plain torch


class Logistics(NamedTuple):
    """weights: `[B, M, H, W]`. means, log_scales: `[B, C, M, H, W]`. coefficients: green by red, blue by red, blue by
    green, like these, in (-1, 1); None of grey images."""

    weights: Tensor
    means: Tensor
    log_scales: Tensor
    coefficients: Tensor | None


def logistics(logits: Tensor, channels: int) -> Logistics:
    """The parts of `mixture_log_prob`'s logits."""
    weights, parameters = _parameters(logits, channels)
    log_scales = parameters[:, :, 1].clamp(min=SMALLEST_LOG_SCALE)
    coefficients = parameters[:, :, 2].tanh() if channels == 3 else None
    return Logistics(weights, parameters[:, :, 0], log_scales, coefficients)


def _parameters(logits: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Weights, and the others `[B, C, 3 or 2 kinds, M, H, W]` as they are."""
    count = logits.shape[1] // parameters_of(channels)
    return logits[:, :count], torch.unflatten(logits[:, count:], 1, (channels, -1, count))


def mixture_log_prob_reference(logits: Tensor, image: Tensor, bits: int, published: bool) -> Tensor:
    """`mixture_log_prob` in plain torch, differentiable by everything."""
    terms, weights = _terms(logits, image, bits, published)
    return torch.logsumexp(terms + F.log_softmax(weights, 1), 1)


def sums_of(logits: Tensor, image: Tensor, bits: int, published: bool) -> Tensor:
    """`[B, 3, H, W]`: a pixel's largest term, weight included, the sum of exp(term - largest), and the logarithm of the
    sum of exp(weight)."""
    terms, weights = _terms(logits, image, bits, published)
    peak = (terms + weights).amax(1)
    total = (terms + weights - peak[:, None]).exp().sum(1)
    return torch.stack((peak, total, torch.logsumexp(weights, 1)), 1)


def _terms(logits: Tensor, image: Tensor, bits: int, published: bool) -> tuple[Tensor, Tensor]:
    """Log probabilities of pixels under each logistic, and weights, `[B, M, H, W]`."""
    of = logistics(logits.to(statistics_dtype(logits)), image.shape[1])
    return _log_masses(*_levels(of, image, bits), published).sum(1), of.weights


def _levels(of: Logistics, image: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Levels in [-1, 1] `[B, C, 1, H, W]`, means given the colours before, logarithms of scales, and half a bin."""
    y = 2 * image - 1
    means = of.means
    if of.coefficients is not None:
        red, green = y[:, :1], y[:, 1:2]
        (r, g, b), k = of.means.unbind(1), of.coefficients.unbind(1)
        means = torch.stack((r, g + k[0] * red, b + k[1] * red + k[2] * green), 1)
    return y[:, :, None], means, of.log_scales, 1 / (2**bits - 1)


def _log_masses(y: Tensor, means: Tensor, log_scales: Tensor, half_bin: float, published: bool) -> Tensor:
    """Logarithm of the mass of each level under each logistic."""
    sharpness = (-log_scales).exp()
    middle = sharpness * (y - means)
    upper, lower = middle + sharpness * half_bin, middle - sharpness * half_bin
    mass = -F.softplus(-upper) - F.softplus(lower) + (-torch.expm1(-2 * half_bin * sharpness)).log()
    if published:
        density = middle - log_scales - 2 * F.softplus(middle) + math.log(2 * half_bin)
        mass = torch.where(mass > PUBLISHED_LOG_MASS, mass, density)
    edges = torch.where(y > top_of(half_bin, published), -F.softplus(lower), mass)
    return torch.where(y < BOTTOM, -F.softplus(-upper), edges)


def _mass_slopes(
    y: Tensor, means: Tensor, log_scales: Tensor, half_bin: float, published: bool
) -> tuple[Tensor, Tensor]:
    """Of `_log_masses` by the means and by the logarithms of scales."""
    sharpness = (-log_scales).exp()
    middle, width = sharpness * (y - means), 2 * half_bin * sharpness
    upper, lower = middle + width / 2, middle - width / 2
    rising, falling = torch.sigmoid(-upper), torch.sigmoid(lower)
    by_middle, by_scale = rising - falling, falling * lower - rising * upper - width / torch.expm1(width)

    def instead(where: Tensor, middle_slope: Tensor, scale_slope: Tensor) -> None:
        nonlocal by_middle, by_scale
        by_middle, by_scale = torch.where(where, middle_slope, by_middle), torch.where(where, scale_slope, by_scale)

    if published:
        slope = 1 - 2 * torch.sigmoid(middle)
        exact = _log_masses(y, means, log_scales, half_bin, published=False)
        instead(exact <= PUBLISHED_LOG_MASS, slope, -middle * slope - 1)
    instead(y > top_of(half_bin, published), -falling, falling * lower)
    instead(y < BOTTOM, rising, -rising * upper)
    return -sharpness * by_middle, by_scale


def _log_prob_aten(logits: Tensor, image: Tensor, bits: int, published: bool) -> tuple[Tensor, Tensor]:
    inputs = (logits, image, bits, published)
    return mixture_log_prob_reference(*inputs).contiguous(), sums_of(*inputs)


def _backward_aten(g: Tensor, logits: Tensor, image: Tensor, sums: Tensor, bits: int, published: bool) -> Tensor:
    of = logistics(logits.to(statistics_dtype(logits)), image.shape[1])
    levels = _levels(of, image, bits)
    peak, total, prior = (t[:, None] for t in sums.unbind(1))
    share = g[:, None] * (_log_masses(*levels, published).sum(1) + of.weights - peak).exp() / total
    by_mean, by_scale = (share[:, None] * slope for slope in _mass_slopes(*levels, published))
    raw = _parameters(logits, image.shape[1])[1][:, :, 1]
    parts = [by_mean, by_scale * (raw >= SMALLEST_LOG_SCALE)]
    if of.coefficients is not None:
        red, green = levels[0][:, :1], levels[0][:, 1:2]
        seen = torch.cat((red, red, green), 1)
        parts.append(by_mean[:, [1, 2, 2]] * seen * (1 - of.coefficients.square()))
    by_weight = share - g[:, None] * (of.weights - prior).exp()
    return torch.cat((by_weight, torch.stack(parts, 2).flatten(1, 3)), 1).to(logits.dtype)


# -- operators: Triton on CUDA, plain torch on the CPU

_log_prob = operator("mixture_log_prob", log_prob_triton, _log_prob_aten)
_backward = operator("mixture_log_prob_backward", backward_triton, _backward_aten, gradient_of="mixture_log_prob")


@_log_prob.register_fake
def _(logits: Tensor, image: Tensor, bits: int, published: bool) -> tuple[Tensor, Tensor]:
    check(logits, image.shape[1], image)
    batch, _, *sides = logits.shape
    wide = statistics_dtype(logits)
    return logits.new_empty(batch, *sides, dtype=wide), logits.new_empty(batch, 3, *sides, dtype=wide)


@_backward.register_fake
def _(g: Tensor, logits: Tensor, image: Tensor, sums: Tensor, bits: int, published: bool) -> Tensor:
    return logits.new_empty(logits.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, image, ctx.bits, ctx.published = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, image, output[1])


def _differentiate(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, image, sums = ctx.saved_tensors
    return _backward(g, logits, image, sums, ctx.bits, ctx.published), None, None, None


_log_prob.register_autograd(_differentiate, setup_context=_remember)
