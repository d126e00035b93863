"""A draw of a normal posterior that is told relative to its prior, and what it costs, in one pass (nvae spec 4, 12 A).

    mean = limited(m)       std = exp(limited(l)) + 0.01       limited(a) = 5 tanh(a / 5)

of the prior's raw (m, l), and of the posterior's, to which the prior's are added first where `relative`. Costs are
summed over pixels in two stages, in a fixed order. The gradient recomputes everything from the raw parameters.
"""

from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels.dispatch import jit, launch, operator, round_up, takes, tl
from hflow_rt.kernels.mixture_kernels import tanh
from hflow_rt.kernels.moments import statistics_dtype

__all__ = ["limited_normal", "normal_divergence", "residual_normal", "residual_normal_reference"]

LIMIT, SMALLEST_STD = 5.0, 0.01


def residual_normal(raw: Tensor, prior: Tensor, noise: Tensor, relative: bool) -> tuple[Tensor, Tensor]:
    """The posterior's value for `noise`, `[B, n, H, W]`, and KL(posterior || prior) of each channel in nats, `[B, n]`.

    raw: `[B, 2n, H, W]`, means and logarithms of deviations as a sampler yields them; prior: like it, or
    `[1, 2n, 1, 1]`. noise: `[B, n, H, W]`, standard normal. relative: whether the prior is added to `raw`. Results are
    float32 at least. Where the noise needs a gradient plain torch is taken.
    """
    return _either(raw, prior, noise, None, relative)


def normal_divergence(raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor, relative: bool) -> Tensor:
    """`log q - log p` of each channel in nats, `[B, n]`, of latents `z` that a map which keeps volume made of the
    value of `residual_normal`: `q` is the posterior's density of that value, `p` the prior's of `z`."""
    return _either(raw, prior, noise, z, relative)[1]


def _either(raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool) -> tuple[Tensor, Tensor]:
    if takes(raw) and not noise.requires_grad:
        made: tuple[Tensor, Tensor] = _residual(raw, prior, noise, z, relative)
        return made
    return residual_normal_reference(raw, prior, noise, z, relative)


# -- plain torch


def limited_normal(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations `[B, n, H, W]` of raw parameters `[B, 2n, H, W]`, float32 at least."""
    mean, log_std = (LIMIT * torch.tanh(part / LIMIT) for part in raw.to(statistics_dtype(raw)).chunk(2, 1))
    return mean, log_std.exp() + SMALLEST_STD


def residual_normal_reference(
    raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool
) -> tuple[Tensor, Tensor]:
    """Both of the above in plain torch: the value, empty where `z` is given, and the cost."""
    mean, std = limited_normal(raw + prior if relative else raw)
    prior_mean, prior_std = limited_normal(prior)
    if z is not None:
        cost = 0.5 * (((z - prior_mean) / prior_std).square() - noise.square()) - (std / prior_std).log()
        return raw.new_empty(0, dtype=cost.dtype), cost.sum((2, 3))
    ratio, apart = std / prior_std, (mean - prior_mean) / prior_std
    cost = 0.5 * (apart.square() + ratio.square()) - 0.5 - ratio.log()
    return mean + std * noise, cost.sum((2, 3))


def _residual_aten(
    raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool
) -> tuple[Tensor, Tensor]:
    value, cost = residual_normal_reference(raw, prior, noise, z, relative)
    return value.contiguous(), cost.contiguous()


def _backward_aten(
    g_value: Tensor | None, g_cost: Tensor, raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, std, *slopes = _with_slopes(raw + prior if relative else raw)
    prior_mean, prior_std, *prior_slopes = _with_slopes(prior.expand_as(raw))
    cost = g_cost[:, :, None, None]
    if z is not None:
        apart = (z - prior_mean) / prior_std
        by_mean, by_std = torch.zeros_like(apart), -cost / std
        by_prior_std = cost * (1 - apart.square()) / prior_std
    else:
        apart, ratio = (mean - prior_mean) / prior_std, std / prior_std
        by_mean, by_std = cost * apart / prior_std, cost * (ratio / prior_std - 1 / std)
        by_prior_std = cost * (1 - apart.square() - ratio.square()) / prior_std
        if g_value is not None:
            by_mean, by_std = by_mean + g_value, by_std + g_value * noise
    d_raw = torch.cat((by_mean * slopes[0], by_std * slopes[1]), 1)
    d_prior = torch.cat((-cost * apart / prior_std * prior_slopes[0], by_prior_std * prior_slopes[1]), 1)
    d_z = raw.new_empty(0) if z is None else (cost * apart / prior_std).to(z.dtype)
    return d_raw.to(raw.dtype), (d_prior + d_raw if relative else d_prior).to(raw.dtype), d_z


def _with_slopes(raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and deviations, and the slopes of both by their raw parameters."""
    share, log_share = torch.tanh(raw.to(statistics_dtype(raw)) / LIMIT).chunk(2, 1)
    spread = (LIMIT * log_share).exp()
    return LIMIT * share, spread + SMALLEST_STD, 1 - share.square(), spread * (1 - log_share.square())


# -- kernels: a tile is some planes whole, or a part of one


@jit
def _limited(raw):
    """5 tanh(raw / 5), and its slope."""
    share = tanh(raw / 5.0)
    return 5.0 * share, 1.0 - share * share


@jit
def _normals(
    raw, prior, batch, channel, pixel, inside, channels, pixels, prior_b, prior_c, prior_p, RELATIVE: tl.constexpr
):  # fmt: skip
    """Means and deviations of posterior and prior, and the slopes of each by its raw parameter."""
    at = raw + (batch.to(tl.int64) * 2 * channels + channel) * pixels + pixel
    mean = tl.load(at, inside, 0.0).to(tl.float32)
    log_std = tl.load(at + channels * pixels, inside, 0.0).to(tl.float32)
    at = prior + batch.to(tl.int64) * prior_b + channel * prior_c + pixel * prior_p
    prior_mean = tl.load(at, inside, 0.0).to(tl.float32)
    prior_log_std = tl.load(at + channels * prior_c, inside, 0.0).to(tl.float32)
    if RELATIVE:
        mean += prior_mean
        log_std += prior_log_std
    mean, by_mean = _limited(mean)
    log_std, by_log_std = _limited(log_std)
    prior_mean, by_prior_mean = _limited(prior_mean)
    prior_log_std, by_prior_log_std = _limited(prior_log_std)
    spread = tl.exp(log_std)
    prior_spread = tl.exp(prior_log_std)
    return (
        mean, spread + 0.01, by_mean, by_log_std * spread,
        prior_mean, prior_spread + 0.01, by_prior_mean, by_prior_log_std * prior_spread,
    )  # fmt: skip


@jit
def _residual_kernel(
    raw, prior, noise, z, value, parts, planes, channels, pixels, prior_b, prior_c, prior_p,
    RELATIVE: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    real = plane < planes
    inside = real & (pixel < pixels)
    mean, std, _, _, prior_mean, prior_std, _, _ = _normals(
        raw, prior, plane // channels, plane % channels, pixel, inside, channels, pixels, prior_b, prior_c, prior_p,
        RELATIVE,
    )  # fmt: skip
    at = plane.to(tl.int64) * pixels + pixel
    drawn = tl.load(noise + at, inside, 0.0).to(tl.float32)
    ratio = std / prior_std
    if z is not None:
        apart = (tl.load(z + at, inside, 0.0).to(tl.float32) - prior_mean) / prior_std
        cost = 0.5 * (apart * apart - drawn * drawn) - tl.log(ratio)
    else:
        apart = (mean - prior_mean) / prior_std
        cost = 0.5 * (apart * apart + ratio * ratio) - 0.5 - tl.log(ratio)
        tl.store(value + at, mean + std * drawn, inside)
    total = tl.expand_dims(tl.sum(tl.where(inside, cost, 0.0), 1), 1)
    tl.store(parts + plane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), total, real)


@jit
def _residual_gradient(
    g_value, g_cost, raw, prior, noise, z, d_raw, d_prior, d_z, planes, channels, pixels, prior_b, prior_c, prior_p,
    RELATIVE: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    real = plane < planes
    inside = real & (pixel < pixels)
    mean, std, mean_slope, std_slope, prior_mean, prior_std, prior_mean_slope, prior_std_slope = _normals(
        raw, prior, plane // channels, plane % channels, pixel, inside, channels, pixels, prior_b, prior_c, prior_p,
        RELATIVE,
    )  # fmt: skip
    at = plane.to(tl.int64) * pixels + pixel
    cost = tl.load(g_cost + plane, real, 0.0).to(tl.float32)
    if z is not None:
        apart = (tl.load(z + at, inside, 0.0).to(tl.float32) - prior_mean) / prior_std
        by_std = -cost / std
        by_prior_std = cost * (1.0 - apart * apart) / prior_std
        by_apart = cost * apart / prior_std
        tl.store(d_z + at, by_apart.to(d_z.dtype.element_ty), inside)
        by_mean = 0.0 * mean
    else:
        apart = (mean - prior_mean) / prior_std
        ratio = std / prior_std
        by_apart = cost * apart / prior_std
        by_mean = by_apart
        by_std = cost * (ratio / prior_std - 1.0 / std)
        by_prior_std = cost * (1.0 - apart * apart - ratio * ratio) / prior_std
        if g_value is not None:
            above = tl.load(g_value + at, inside, 0.0).to(tl.float32)
            by_mean += above
            by_std += above * tl.load(noise + at, inside, 0.0).to(tl.float32)
    by_mean *= mean_slope
    by_std *= std_slope
    by_prior_mean = -by_apart * prior_mean_slope
    by_prior_std *= prior_std_slope
    if RELATIVE:
        by_prior_mean += by_mean
        by_prior_std += by_std
    channel = plane % channels
    at = ((plane // channels).to(tl.int64) * 2 * channels + channel) * pixels + pixel
    kind = d_raw.dtype.element_ty
    tl.store(d_raw + at, by_mean.to(kind), inside)
    tl.store(d_raw + at + channels * pixels, by_std.to(kind), inside)
    tl.store(d_prior + at, by_prior_mean.to(kind), inside)
    tl.store(d_prior + at + channels * pixels, by_prior_std.to(kind), inside)


# -- host

TILE = 512  # numbers of one program


def _tile(planes: int, pixels: int) -> tuple[tuple[int, int], int, int, int]:
    """Grid, planes and pixels a tile, and warps: 4 numbers a thread, of six tensors each."""
    across = min(TILE, round_up(pixels))
    side = max(1, min(TILE // across, round_up(planes)))
    return (-(-planes // side), -(-pixels // across)), side, across, max(1, side * across // 128)


def _check(raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None) -> None:
    if raw.dim() != 4 or raw.shape[1] % 2:
        raise ValueError(f"raw parameters must be [B, 2n, H, W], not {list(raw.shape)}")
    if tuple(prior.shape) not in (tuple(raw.shape), (1, raw.shape[1], 1, 1)) or prior.dtype != raw.dtype:
        raise ValueError(f"the prior must be like {list(raw.shape)}, or {[1, raw.shape[1], 1, 1]}, not {_told(prior)}")
    wanted = (raw.shape[0], raw.shape[1] // 2, *raw.shape[2:])
    for other in (noise, *([] if z is None else [z])):
        if tuple(other.shape) != wanted:
            raise ValueError(f"noise and latents must be {list(wanted)}, not {list(other.shape)}")


def _told(t: Tensor) -> str:
    return f"{list(t.shape)} of {t.dtype}"


def _arguments(
    raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """The grid, its warps, and what both kernels take."""
    channels, pixels = raw.shape[1] // 2, raw.shape[2] * raw.shape[3]
    grid, side, across, warps = _tile(len(raw) * channels, pixels)
    of_all = prior.shape != raw.shape
    return grid, warps, {
        "raw": raw.contiguous(), "prior": prior.contiguous(), "noise": noise.contiguous(),
        "z": None if z is None else z.contiguous(),
        "planes": len(raw) * channels, "channels": channels, "pixels": pixels,
        "prior_b": 0 if of_all else 2 * channels * pixels, "prior_c": 1 if of_all else pixels,
        "prior_p": 0 if of_all else 1, "RELATIVE": relative, "PLANES": side, "PIXELS": across,
    }  # fmt: skip


def _residual_triton(
    raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool
) -> tuple[Tensor, Tensor]:
    _check(raw, prior, noise, z)
    grid, warps, known = _arguments(raw, prior, noise, z, relative)
    value = torch.empty(0 if z is not None else noise.shape, dtype=torch.float32, device=raw.device)
    parts = torch.empty(known["planes"], grid[1], dtype=torch.float32, device=raw.device)
    launch(_residual_kernel, grid, warps, value=None if z is not None else value, parts=parts, **known)
    return value, parts.sum(1).view(noise.shape[:2])


def _backward_triton(
    g_value: Tensor | None, g_cost: Tensor, raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grid, warps, known = _arguments(raw, prior, noise, z, relative)
    d_raw, d_prior = (torch.empty(raw.shape, dtype=raw.dtype, device=raw.device) for _ in range(2))
    d_z = torch.empty(0 if z is None else z.shape, dtype=raw.dtype if z is None else z.dtype, device=raw.device)
    launch(
        _residual_gradient, grid, warps, d_raw=d_raw, d_prior=d_prior, d_z=None if z is None else d_z,
        g_value=None if g_value is None or z is not None else g_value.contiguous(), g_cost=g_cost.contiguous(), **known,
    )  # fmt: skip
    return d_raw, d_prior, d_z


# -- operators: Triton on CUDA, plain torch on the CPU

_residual = operator("residual_normal", _residual_triton, _residual_aten)
_backward = operator("residual_normal_backward", _backward_triton, _backward_aten, gradient_of="residual_normal")


@_residual.register_fake
def _(raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool) -> tuple[Tensor, Tensor]:
    _check(raw, prior, noise, z)
    wide = statistics_dtype(raw)
    value = raw.new_empty(0 if z is not None else noise.shape, dtype=wide)
    return value, raw.new_empty(noise.shape[:2], dtype=wide)


@_backward.register_fake
def _(
    g_value: Tensor | None, g_cost: Tensor, raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_z = raw.new_empty(0) if z is None else z.new_empty(z.shape)
    return raw.new_empty(raw.shape), raw.new_empty(raw.shape), d_z


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.relative = inputs[4]


def _differentiate(ctx: Any, g_value: Tensor, g_cost: Tensor) -> tuple[Tensor | None, ...]:
    raw, prior, noise, z = ctx.saved_tensors
    d_raw, d_prior, d_z = _backward(g_value, g_cost, raw, prior, noise, z, ctx.relative)
    return d_raw, d_prior.sum_to_size(prior.shape), None, None if z is None else d_z, None


_residual.register_autograd(_differentiate, setup_context=_remember)
