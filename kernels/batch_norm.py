"""Batch normalisation as it trains, then SiLU, in the passes of `group_norm` (nvae spec 12 D).

Moments of planes are pooled over the batch instead of over a group's channels; what reads and writes tensors are group
norm's kernels, for which every channel is a group whose moments all samples share.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import jit, launch, operator, tl
from hflow_rt.kernels.group_norm import (
    EPSILON,
    _arguments,
    _norm_silu,
    _norm_silu_gradient,
    _plane_parts,
    _tile,
)
from hflow_rt.kernels.instance_norm import _steps
from hflow_rt.kernels.moments import pooled, statistics_dtype

__all__ = ["batch_norm_silu", "batch_norm_silu_reference"]


def batch_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of `[B, C, H, W]`, normed by the moments of each channel; those, mean and biased variance, `[C]`.

    weight, bias: `[C]`, after the norm. The result has the type of `x`; moments are float32 at least, without gradient.
    Always the operator: ask `dispatch.takes` first.
    """
    y, moments = _norm(x, weight, bias)
    return y, moments[:, 0], (moments[:, 1] ** -2 - EPSILON).clamp(min=0)


# -- plain torch


def moments_of_channels(x: Tensor) -> Tensor:
    """`[C, 2]`: mean and 1 / sqrt(variance + epsilon)."""
    variance, mean = torch.var_mean(x.to(statistics_dtype(x)), (0, 2, 3), correction=0)
    return torch.stack([mean, torch.rsqrt(variance + EPSILON)], 1)


def batch_norm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The result of `batch_norm_silu` in plain torch, differentiable any number of times."""
    wide = x.to(statistics_dtype(x))
    normed = F.batch_norm(wide, None, None, weight.to(wide), bias.to(wide), training=True, eps=EPSILON)
    return F.silu(normed).to(x.dtype)


def _hat(x: Tensor, moments: Tensor) -> Tensor:
    return (x.to(moments.dtype) - moments[:, 0, None, None]) * moments[:, 1, None, None]


def _norm_aten(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    moments = moments_of_channels(x)
    z = _hat(x, moments) * weight[:, None, None] + bias[:, None, None]
    return F.silu(z).to(x.dtype).contiguous(), moments


def _backward_aten(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    hat = _hat(x, moments)
    z = hat * weight[:, None, None] + bias[:, None, None]
    share = z.sigmoid()
    slope = g.to(z.dtype) * share * (1 + z * (1 - share))
    sums = torch.stack([slope.sum((0, 2, 3)), (slope * hat).sum((0, 2, 3))], 1)
    means = (sums * weight[:, None] / (x.numel() // x.shape[1]))[..., None, None]
    d = (slope * weight[:, None, None] - means[:, 0] - hat * means[:, 1]) * moments[:, 1, None, None]
    return d.to(x.dtype).contiguous(), sums


# -- the one kernel of its own


@jit
def _gather_channel(parts, moments, channels, many, batch, EPS: tl.constexpr, PARTS: tl.constexpr):
    """Moments of a channel from `many` parts of each of its planes, of which each turn pools `PARTS`, about the mean of
    the first."""
    channel = tl.program_id(0)
    start = tl.load(parts + channel * many * 3 + 1)
    total = start * 0.0
    away = total
    squares = total
    for done in range(0, batch * many, PARTS):
        part = done + tl.arange(0, PARTS)
        inside = part < batch * many
        at = parts + (((part // many).to(tl.int64) * channels + channel) * many + part % many) * 3
        count = tl.load(at, inside, 0.0)
        off = tl.where(inside, tl.load(at + 1, inside, 0.0) - start, 0.0)
        more, more_away, more_squares = pooled(count, off, tl.load(at + 2, inside, 0.0), 0)
        off = more_away - away
        share = more / (total + more)
        squares += more_squares + off * off * total * share
        away += off * share
        total += more
    tl.store(moments + channel * 2, start + away)
    tl.store(moments + channel * 2 + 1, 1.0 / tl.sqrt(squares / total + EPS))


# -- host


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"batch norm needs [B, C, H, W], not {list(x.shape)}")
    for each in (weight, bias):
        if tuple(each.shape) != (x.shape[1],):
            raise ValueError(f"weight and bias must be {[x.shape[1]]}, not {list(each.shape)}")


def _shared(x: Tensor, *others: Tensor) -> dict[str, Any]:
    """What group norm's kernels take: no group's moments are those of one sample."""
    return _arguments(x, None, None, x.shape[1], *others) | {"groups": 0}


def _norm_triton(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias)
    known, channels = _shared(x), x.shape[1]
    grid, side, across, warps = _tile(known["planes"], known["pixels"])
    tile = {"PLANES": side, "PIXELS": across}
    parts = torch.empty(known["planes"], grid[1], 3, dtype=torch.float32, device=x.device)
    only = {name: value for name, value in known.items() if name not in ("level", "level_b", "groups", "per")}
    launch(_plane_parts, grid, warps, parts=parts, **only, **tile)
    moments = torch.empty(channels, 2, dtype=torch.float32, device=x.device)
    launch(
        _gather_channel, (channels,), 4, parts=parts, moments=moments, channels=channels, many=grid[1], batch=len(x),
        EPS=EPSILON, PARTS=PARTS,
    )  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    affine = {"weight": weight.contiguous(), "bias": bias.contiguous()}
    launch(_norm_silu, grid, warps, **affine, moments=moments, y=y, **known, **tile)
    return y, moments


PARTS = 512  # of a channel that a program pools together


def _backward_triton(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    known = _shared(x, g)
    grid, side, across, warps = _tile(known["planes"], known["pixels"])
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(known["planes"], grid[1], 3, dtype=torch.float32, device=x.device)
    common = {
        "g": g, "weight": weight.contiguous(), "bias": bias.contiguous(), "moments": moments.contiguous(), **known,
        "d_x": d_x, "d_skip": None, **_steps(g, "g"), "PLANES": side, "PIXELS": across,
    }  # fmt: skip
    launch(_norm_silu_gradient, grid, warps, means=None, sums=parts, SUMS="part", **common)
    sums = parts.view(len(x), x.shape[1], -1, 3)[..., :2].sum((0, 2))  # in a fixed order, as all of torch's sums
    means = (sums * weight.float()[:, None] / (x.numel() // x.shape[1])).contiguous()
    launch(_norm_silu_gradient, grid, warps, means=means, sums=None, SUMS="read", **common)
    return d_x, sums


# -- operators: Triton on CUDA, plain torch on the CPU

_norm = operator("batch_norm_silu", _norm_triton, _norm_aten)
_backward = operator("batch_norm_silu_backward", _backward_triton, _backward_aten, gradient_of="batch_norm_silu")


@_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias)
    return x.new_empty(x.shape), x.new_empty(x.shape[1], 2, dtype=statistics_dtype(x))


@_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1], 2, dtype=statistics_dtype(x))


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    x, weight, bias, moments = ctx.saved_tensors
    d_x, sums = _backward(g, x, weight, bias, moments)
    return d_x, sums[:, 1].to(weight.dtype), sums[:, 0].to(bias.dtype)


_norm.register_autograd(_differentiate, setup_context=_remember)
