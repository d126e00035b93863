"""The kernels of `logistic_mixture` and what `mixture_image` shares with them: a lane owns a pixel."""

import math
from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels.dispatch import jit, launch, tl

__all__ = [
    "BOTTOM",
    "PIXELS",
    "PUBLISHED_LOG_MASS",
    "SMALLEST_LOG_SCALE",
    "backward_triton",
    "check",
    "log_prob_triton",
    "parameter_at",
    "parameters_of",
    "tanh",
    "top_of",
]

SMALLEST_LOG_SCALE = -7.0
BOTTOM, _PUBLISHED_TOP = -0.999, 0.99  # in [-1, 1], where edge levels begin
PUBLISHED_LOG_MASS = math.log(1e-5)  # below it the published form takes the density at the middle


@jit
def _sides(x):
    """-log sigmoid(-x), which is softplus, and sigmoid(x); nothing overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.log(1.0 + small), tl.where(x > 0.0, 1.0, small) / (1.0 + small)


@jit
def _share_below(width):
    """1 - exp(-width), of which small widths leave few digits unless a series makes it."""
    series = 1.0 - width / 6.0 * (1.0 - width / 7.0)
    series = 1.0 - width / 2.0 * (1.0 - width / 3.0 * (1.0 - width / 4.0 * (1.0 - width / 5.0 * series)))
    return tl.where(width < 0.25, width * series, 1.0 - tl.exp(-width))


@jit
def parameter_at(at, kind, count, pixels, component):
    """A parameter of pixels: kinds are weights, then each colour's."""
    return tl.load(at + (kind * count + component) * pixels).to(tl.float32)


@jit
def tanh(x):
    """By what every version of Triton has."""
    small = tl.exp(-2.0 * tl.abs(x))
    share = (1.0 - small) / (1.0 + small)
    return tl.where(x > 0.0, share, -share)


@jit
def _mass(y, mean, raw, HALF_BIN: tl.constexpr, TOP: tl.constexpr, PUBLISHED: tl.constexpr):
    """Logarithm of the mass of a level, and its slopes by mean and by the raw logarithm of the scale.

    Numbers are SMALLEST_LOG_SCALE, PUBLISHED_LOG_MASS and BOTTOM.
    """
    sharpness = tl.exp(-tl.maximum(raw, -7.0))
    middle = sharpness * (y - mean)
    upper = middle + sharpness * HALF_BIN
    lower = middle - sharpness * HALF_BIN
    below, rising = _sides(-upper)
    above, falling = _sides(lower)
    width = 2.0 * HALF_BIN * sharpness
    share = _share_below(width)
    mass = tl.log(share) - below - above
    by_middle = rising - falling
    by_scale = falling * lower - rising * upper - width * tl.exp(-width) / share
    if PUBLISHED:
        tiny = mass <= -11.512925464970229
        beyond, share_above = _sides(middle)
        slope = 1.0 - 2.0 * share_above
        mass = tl.where(tiny, middle + tl.log(width) - 2.0 * beyond, mass)
        by_middle = tl.where(tiny, slope, by_middle)
        by_scale = tl.where(tiny, -middle * slope - 1.0, by_scale)
    top = y > TOP
    mass = tl.where(top, -above, mass)
    by_middle = tl.where(top, -falling, by_middle)
    by_scale = tl.where(top, falling * lower, by_scale)
    bottom = y < -0.999
    mass = tl.where(bottom, -below, mass)
    by_middle = tl.where(bottom, rising, by_middle)
    by_scale = tl.where(bottom, -rising * upper, by_scale)
    return mass, -sharpness * by_middle, tl.where(raw >= -7.0, by_scale, 0.0)


@jit
def _grown(peak, total, value):
    """`total * exp(peak)` and `exp(value)` added, with a peak that keeps it finite."""
    higher = tl.maximum(peak, value)
    return higher, total * tl.exp(peak - higher) + tl.exp(value - higher)


@jit
def _log_prob_kernel(
    logits, image, out, sums, numbers, count, pixels, HALF_BIN: tl.constexpr, TOP: tl.constexpr,
    PUBLISHED: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program makes `PIXELS` pixels of a sample, the last one again where there are fewer."""
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    pixel = tl.minimum(pixel, pixels - 1)
    at = logits + sample * numbers * pixels + pixel
    shown = image + sample * CHANNELS * pixels + pixel
    red = 2.0 * tl.load(shown).to(tl.float32) - 1.0
    if CHANNELS == 3:
        green = 2.0 * tl.load(shown + pixels).to(tl.float32) - 1.0
        blue = 2.0 * tl.load(shown + 2 * pixels).to(tl.float32) - 1.0
    peak = tl.full((PIXELS,), -3e38, tl.float32)
    prior_peak = peak
    total = tl.zeros((PIXELS,), tl.float32)
    prior_total = total
    for m in range(count):
        weight = parameter_at(at, 0, count, pixels, m)
        mean = parameter_at(at, 1, count, pixels, m)
        value, _, _ = _mass(red, mean, parameter_at(at, 2, count, pixels, m), HALF_BIN, TOP, PUBLISHED)
        if CHANNELS == 3:
            mean = parameter_at(at, 4, count, pixels, m)
            mean += tanh(parameter_at(at, 3, count, pixels, m)) * red
            more, _, _ = _mass(green, mean, parameter_at(at, 5, count, pixels, m), HALF_BIN, TOP, PUBLISHED)
            value += more
            mean = parameter_at(at, 7, count, pixels, m)
            mean += tanh(parameter_at(at, 6, count, pixels, m)) * red
            mean += tanh(parameter_at(at, 9, count, pixels, m)) * green
            more, _, _ = _mass(blue, mean, parameter_at(at, 8, count, pixels, m), HALF_BIN, TOP, PUBLISHED)
            value += more
        peak, total = _grown(peak, total, value + weight)
        prior_peak, prior_total = _grown(prior_peak, prior_total, weight)
    prior = prior_peak + tl.log(prior_total)
    tl.store(out + sample * pixels + pixel, peak + tl.log(total) - prior, inside)
    to = sums + sample * 3 * pixels + pixel
    tl.store(to, peak, inside)
    tl.store(to + pixels, total, inside)
    tl.store(to + 2 * pixels, prior, inside)


@jit
def _log_prob_gradient(
    g, logits, image, sums, d_logits, numbers, count, pixels, HALF_BIN: tl.constexpr, TOP: tl.constexpr,
    PUBLISHED: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    pixel = tl.minimum(pixel, pixels - 1)
    start = sample * numbers * pixels + pixel
    at = logits + start
    to = d_logits + start
    kind = d_logits.dtype.element_ty
    shown = image + sample * CHANNELS * pixels + pixel
    red = 2.0 * tl.load(shown).to(tl.float32) - 1.0
    if CHANNELS == 3:
        green = 2.0 * tl.load(shown + pixels).to(tl.float32) - 1.0
        blue = 2.0 * tl.load(shown + 2 * pixels).to(tl.float32) - 1.0
    above = tl.load(g + sample * pixels + pixel).to(tl.float32)
    kept = sums + sample * 3 * pixels + pixel
    peak = tl.load(kept)
    total = tl.load(kept + pixels)
    prior = tl.load(kept + 2 * pixels)
    for m in range(count):
        weight = parameter_at(at, 0, count, pixels, m)
        mean = parameter_at(at, 1, count, pixels, m)
        value, by_red, by_red_scale = _mass(
            red, mean, parameter_at(at, 2, count, pixels, m), HALF_BIN, TOP, PUBLISHED
        )  # fmt: skip
        if CHANNELS == 3:
            by_first = tanh(parameter_at(at, 3, count, pixels, m))
            mean = parameter_at(at, 4, count, pixels, m) + by_first * red
            more, by_green, by_green_scale = _mass(
                green, mean, parameter_at(at, 5, count, pixels, m), HALF_BIN, TOP, PUBLISHED
            )  # fmt: skip
            value += more
            by_second = tanh(parameter_at(at, 6, count, pixels, m))
            by_third = tanh(parameter_at(at, 9, count, pixels, m))
            mean = parameter_at(at, 7, count, pixels, m) + by_second * red + by_third * green
            more, by_blue, by_blue_scale = _mass(
                blue, mean, parameter_at(at, 8, count, pixels, m), HALF_BIN, TOP, PUBLISHED
            )  # fmt: skip
            value += more
        share = above * tl.exp(value + weight - peak) / total  # of this logistic, given the pixel
        tl.store(to + m * pixels, (share - above * tl.exp(weight - prior)).to(kind), inside)
        tl.store(to + (count + m) * pixels, (share * by_red).to(kind), inside)
        tl.store(to + (2 * count + m) * pixels, (share * by_red_scale).to(kind), inside)
        if CHANNELS == 3:
            slope = share * by_green
            tl.store(to + (3 * count + m) * pixels, (slope * red * (1.0 - by_first * by_first)).to(kind), inside)
            tl.store(to + (4 * count + m) * pixels, slope.to(kind), inside)
            tl.store(to + (5 * count + m) * pixels, (share * by_green_scale).to(kind), inside)
            slope = share * by_blue
            tl.store(to + (6 * count + m) * pixels, (slope * red * (1.0 - by_second * by_second)).to(kind), inside)
            tl.store(to + (7 * count + m) * pixels, slope.to(kind), inside)
            tl.store(to + (8 * count + m) * pixels, (share * by_blue_scale).to(kind), inside)
            tl.store(to + (9 * count + m) * pixels, (slope * green * (1.0 - by_third * by_third)).to(kind), inside)


# -- host

PIXELS = 128  # of a program, one a thread


def parameters_of(channels: int) -> int:
    """Of a logistic of every pixel."""
    return 10 if channels == 3 else 1 + 2 * channels


def top_of(half_bin: float, published: bool) -> float:
    """In [-1, 1], where the top level begins."""
    return _PUBLISHED_TOP if published else 1 - half_bin


def check(logits: Tensor, channels: int, *alike: Tensor) -> int:
    """How many logistics there are. Raises `ValueError` unless all are of the pixels of `logits`."""
    if logits.dim() != 4 or channels not in (1, 3) or logits.shape[1] % parameters_of(channels):
        raise ValueError(
            f"logits must be [B, {parameters_of(channels)} M, H, W] for {channels} channels of 1 or 3, "
            f"not {list(logits.shape)}"
        )
    for other in alike:
        if (other.shape[0], *other.shape[2:]) != (logits.shape[0], *logits.shape[2:]):
            raise ValueError(f"images and draws must be of the pixels of {list(logits.shape)}, not {list(other.shape)}")
    return logits.shape[1] // parameters_of(channels)


def _arguments(logits: Tensor, image: Tensor, bits: int, published: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and what both kernels take."""
    count, pixels = check(logits, image.shape[1], image), logits.shape[2] * logits.shape[3]
    half_bin = 1 / (2**bits - 1)
    return (-(-pixels // PIXELS), len(logits)), {
        "logits": logits.contiguous(), "image": image.contiguous(), "numbers": logits.shape[1], "count": count,
        "pixels": pixels,
        "HALF_BIN": half_bin, "TOP": top_of(half_bin, published), "PUBLISHED": published, "CHANNELS": image.shape[1],
        "PIXELS": PIXELS,
    }  # fmt: skip


def log_prob_triton(logits: Tensor, image: Tensor, bits: int, published: bool) -> tuple[Tensor, Tensor]:
    """`mixture_log_prob`, and the sums of `logistic_mixture.sums_of`."""
    grid, known = _arguments(logits, image, bits, published)
    batch, _, *sides = logits.shape
    out = torch.empty(batch, *sides, dtype=torch.float32, device=logits.device)
    sums = torch.empty(batch, 3, *sides, dtype=torch.float32, device=logits.device)
    launch(_log_prob_kernel, grid, 4, out=out, sums=sums, **known)
    return out, sums


def backward_triton(g: Tensor, logits: Tensor, image: Tensor, sums: Tensor, bits: int, published: bool) -> Tensor:
    """The gradient by the logits of that of the result, `[B, H, W]`."""
    grid, known = _arguments(logits, image, bits, published)
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch(_log_prob_gradient, grid, 4, g=g.contiguous(), sums=sums.contiguous(), d_logits=d_logits, **known)
    return d_logits
