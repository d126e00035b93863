"""Group normalisation, then SiLU, of channels that may lie in two tensors, after a bias a channel (ihdm spec 11b).

    y = z sigmoid(z)        z = hat * weight + bias        hat = (x + level - mean) / sqrt(variance + epsilon)

`x` is what is given, or it and `skip` side by side, which then need not be copied together. `level` moves the mean of
each channel, so it needs no pass of its own: every channel's mean and squares about it are found first, then those of
a group are pooled from them. Two passes read, one writes. Nothing but the inputs and the moments `[B, groups, 2]` is
kept for the gradient, whose sums are made in two stages too, so two runs agree bit for bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import jit, launch, operator, round_up, takes, tl
from hflow_rt.kernels.instance_norm import _flat, _pixels_at, _steps
from hflow_rt.kernels.moments import pooled, statistics_dtype

__all__ = ["group_norm_silu", "group_norm_silu_reference"]

EPSILON = 1e-5


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, skip: Tensor | None = None, level: Tensor | None = None
) -> Tensor:
    """SiLU of the group norm of `[B, C1, H, W]`, or of it and `skip` `[B, C2, H, W]` side by side, `[B, C, H, W]`.

    weight, bias: `[C]`, after the norm. level: `[C]`, `[1, C]` or `[B, C]`, added before it. The result has the type of
    `x`; statistics are float32 at least.
    """
    if takes(x):
        y: Tensor = _norm(x, skip, level, weight, bias, groups)[0]
        return y
    return group_norm_silu_reference(x, skip, level, weight, bias, groups)


# -- plain torch


def group_norm_silu_reference(
    x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> Tensor:
    """`group_norm_silu` in plain torch, differentiable any number of times."""
    wide = _together(x, skip, level)
    return F.silu(F.group_norm(wide, groups, weight.to(wide), bias.to(wide), EPSILON)).to(x.dtype)


def _together(x: Tensor, skip: Tensor | None, level: Tensor | None) -> Tensor:
    whole = x if skip is None else torch.cat([x, skip], 1)
    whole = whole.to(statistics_dtype(x))
    return whole if level is None else whole + level[..., None, None]


def moments_of_groups(x: Tensor, skip: Tensor | None, level: Tensor | None, groups: int) -> Tensor:
    """`[B, groups, 2]`: mean and 1 / sqrt(variance + epsilon)."""
    variance, mean = torch.var_mean(_together(x, skip, level).unflatten(1, (groups, -1)), (2, 3, 4), correction=0)
    return torch.stack([mean, torch.rsqrt(variance + EPSILON)], 2)


def _hat(x: Tensor, skip: Tensor | None, level: Tensor | None, moments: Tensor) -> Tensor:
    groups = moments.shape[1]
    whole = _together(x, skip, level)
    mean, rate = (moments[..., i].repeat_interleave(whole.shape[1] // groups, 1)[..., None, None] for i in (0, 1))
    return (whole - mean) * rate


def _norm_aten(
    x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    moments = moments_of_groups(x, skip, level, groups)
    z = _hat(x, skip, level, moments) * weight[:, None, None] + bias[:, None, None]
    return F.silu(z).to(x.dtype).contiguous(), moments


def _backward_aten(
    g: Tensor, x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hat = _hat(x, skip, level, moments)
    z = hat * weight[:, None, None] + bias[:, None, None]
    share = z.sigmoid()
    slope = g.to(z.dtype) * share * (1 + z * (1 - share))
    sums = torch.stack([slope.sum((2, 3)), (slope * hat).sum((2, 3)), hat.sum((2, 3))], 2)
    per = sums.shape[1] // moments.shape[1]
    means = _means(sums, weight, moments, x.shape[2] * x.shape[3]).repeat_interleave(per, 1)
    rate = moments[..., 1].repeat_interleave(per, 1)[..., None, None]
    d = (slope * weight[:, None, None] - means[..., :1, None] - hat * means[..., 1:, None]) * rate
    split = x.shape[1]
    # copies, because of one image both would be parts of one tensor, which results of an operator may not be
    d_x, d_skip = (
        part.to(x.dtype, memory_format=torch.contiguous_format, copy=True) for part in (d[:, :split], d[:, split:])
    )
    return d_x, d_skip if skip is not None else x.new_empty(0), sums


def _means(sums: Tensor, weight: Tensor, moments: Tensor, pixels: int) -> Tensor:
    """Means over each group of the slope by hat and of its product with hat, `[B, groups, 2]`."""
    weighted = sums[..., :2] * weight[:, None]
    of_groups = weighted.reshape(len(sums), moments.shape[1], -1, 2).sum(2)
    return of_groups / (sums.shape[1] // moments.shape[1] * pixels)


# -- kernels: a tile is some planes whole, or a part of one


@jit
def _load_either(
    x, skip, split, batch, channel, pixel, inside, width,
    x_b, x_c, x_h, x_w, skip_b, skip_c, skip_h, skip_w, FLAT: tl.constexpr,
):  # fmt: skip
    """Pixels of planes of which the first `split` of a sample are in `x`, the others in `skip`."""
    at = _pixels_at(x, pixel, width, x_b, x_c, x_h, x_w, batch, channel, FLAT)
    value = tl.load(at, inside & (channel < split), 0.0).to(tl.float32)
    if skip is not None:
        at = _pixels_at(skip, pixel, width, skip_b, skip_c, skip_h, skip_w, batch, channel - split, FLAT)
        value += tl.load(at, inside & (channel >= split), 0.0).to(tl.float32)
    return value


@jit
def _hat_at(value, level, moments, batch, channel, groups, per, level_b, real):
    """What the norm makes of pixels, and the rate of their group."""
    told = moments + (batch.to(tl.int64) * groups + channel // per) * 2
    mean = tl.load(told, real, 0.0)
    rate = tl.load(told + 1, real, 0.0)
    if level is not None:
        mean -= tl.load(level + batch.to(tl.int64) * level_b + channel, real, 0.0).to(tl.float32)
    return (value - mean) * rate, rate


@jit
def _plane_parts(
    x, skip, parts, planes, channels, split, pixels, width,
    x_b, x_c, x_h, x_w, skip_b, skip_c, skip_h, skip_w,
    FLAT: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Count, mean and squares about the mean of parts of planes."""
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    real = plane < planes
    inside = real & (pixel < pixels)
    value = _load_either(
        x, skip, split, plane // channels, plane % channels, pixel, inside, width,
        x_b, x_c, x_h, x_w, skip_b, skip_c, skip_h, skip_w, FLAT,
    )  # fmt: skip
    count = tl.minimum(pixels - tl.program_id(1) * PIXELS, PIXELS) * 1.0
    mean = tl.expand_dims(tl.sum(value, 1), 1) / count
    off = tl.where(inside, value - mean, 0.0)
    out = parts + (plane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(out, tl.where(real, count, 0.0), real)
    tl.store(out + 1, mean, real)
    tl.store(out + 2, tl.expand_dims(tl.sum(off * off, 1), 1), real)


@jit
def _gather_groups(
    parts, level, moments, rows, groups, per, many, level_b,
    EPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Moments of groups from `many` parts of each of their `per` channels, moved by the level."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    part = tl.arange(0, PARTS)[None, :]
    inside = (row < rows) & (part < per * many)
    at = (row.to(tl.int64) * (per * many) + part) * 3
    count = tl.load(parts + at, inside, 0.0)
    mean = tl.load(parts + at + 1, inside, 0.0)
    squares = tl.load(parts + at + 2, inside, 0.0)
    if level is not None:
        channel = (row % groups) * per + part // many
        mean += tl.load(level + (row // groups).to(tl.int64) * level_b + channel, inside, 0.0).to(tl.float32)
    total, mean, squares = pooled(count, mean, squares, 1)
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(moments + out.to(tl.int64) * 2, mean, out < rows)
    tl.store(moments + out.to(tl.int64) * 2 + 1, 1.0 / tl.sqrt(squares / tl.maximum(total, 1.0) + EPS), out < rows)


@jit
def _norm_silu(
    x, skip, level, weight, bias, moments, y, planes, channels, split, groups, per, pixels, width, level_b,
    x_b, x_c, x_h, x_w, skip_b, skip_c, skip_h, skip_w,
    FLAT: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    batch = plane // channels
    channel = plane % channels
    real = plane < planes
    inside = real & (pixel < pixels)
    value = _load_either(
        x, skip, split, batch, channel, pixel, inside, width,
        x_b, x_c, x_h, x_w, skip_b, skip_c, skip_h, skip_w, FLAT,
    )  # fmt: skip
    hat, _ = _hat_at(value, level, moments, batch, channel, groups, per, level_b, real)
    z = hat * tl.load(weight + channel, real, 0.0).to(tl.float32) + tl.load(bias + channel, real, 0.0).to(tl.float32)
    tl.store(y + plane.to(tl.int64) * pixels + pixel, (z * tl.sigmoid(z)).to(y.dtype.element_ty), inside)


@jit
def _norm_silu_gradient(
    g, x, skip, level, weight, bias, moments, means, sums, d_x, d_skip,
    planes, channels, split, groups, per, pixels, width, level_b,
    x_b, x_c, x_h, x_w, skip_b, skip_c, skip_h, skip_w, g_b, g_c, g_h, g_w,
    SUMS: tl.constexpr, FLAT: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """`SUMS` "part" writes what parts of planes add to the sums, "read" makes the gradients of the means of these."""
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    batch = plane // channels
    channel = plane % channels
    real = plane < planes
    inside = real & (pixel < pixels)
    value = _load_either(
        x, skip, split, batch, channel, pixel, inside, width,
        x_b, x_c, x_h, x_w, skip_b, skip_c, skip_h, skip_w, FLAT,
    )  # fmt: skip
    hat, rate = _hat_at(value, level, moments, batch, channel, groups, per, level_b, real)
    hat = tl.where(inside, hat, 0.0)
    factor = tl.load(weight + channel, real, 0.0).to(tl.float32)
    z = hat * factor + tl.load(bias + channel, real, 0.0).to(tl.float32)
    share = tl.sigmoid(z)
    above = tl.load(_pixels_at(g, pixel, width, g_b, g_c, g_h, g_w, batch, channel, FLAT), inside, 0.0).to(tl.float32)
    slope = above * share * (1.0 + z * (1.0 - share))
    if SUMS == "part":
        to = sums + (plane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 3
        tl.store(to, tl.expand_dims(tl.sum(slope, 1), 1), real)
        tl.store(to + 1, tl.expand_dims(tl.sum(slope * hat, 1), 1), real)
        tl.store(to + 2, tl.expand_dims(tl.sum(hat, 1), 1), real)
    else:
        told = means + (batch.to(tl.int64) * groups + channel // per) * 2
        plain = tl.load(told, real, 0.0)
        along = tl.load(told + 1, real, 0.0)
        result = (slope * factor - plain - hat * along) * rate
        out = (batch.to(tl.int64) * split + channel) * pixels + pixel
        tl.store(d_x + out, result.to(d_x.dtype.element_ty), inside & (channel < split))
        if skip is not None:
            out = (batch.to(tl.int64) * (channels - split) + channel - split) * pixels + pixel
            tl.store(d_skip + out, result.to(d_skip.dtype.element_ty), inside & (channel >= split))


# -- host

PART = 2048  # pixels of a plane that one program of 4 warps holds: 16 a thread


def _tile(planes: int, pixels: int) -> tuple[tuple[int, int], int, int, int]:
    """Grid, planes and pixels a tile, and warps: 16 numbers a thread, 8 of several planes: addresses take room."""
    width = min(PART, round_up(pixels))
    side = max(1, min(1024 // width, round_up(planes)))
    warps = max(1, side * width // (512 if side == 1 else 256))
    return (-(-planes // side), -(-pixels // width)), side, width, warps


def _check(x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, groups: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"group norm needs [B, C, H, W], not {list(x.shape)}")
    if skip is not None and (skip.dtype != x.dtype or (skip.shape[0], *skip.shape[2:]) != (x.shape[0], *x.shape[2:])):
        raise ValueError(f"skip must be like {list(x.shape)} but for its channels, not {list(skip.shape)}")
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if channels % groups:
        raise ValueError(f"{groups} groups must divide {channels} channels")
    if level is not None and tuple(level.shape) not in ((channels,), (1, channels), (x.shape[0], channels)):
        raise ValueError(f"the level must be {[channels]} or {[x.shape[0], channels]}, not {list(level.shape)}")
    for each in (weight, bias):
        if tuple(each.shape) != (channels,):
            raise ValueError(f"weight and bias must be {[channels]}, not {list(each.shape)}")


def _arguments(x: Tensor, skip: Tensor | None, level: Tensor | None, groups: int, *others: Tensor) -> dict[str, Any]:
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    inputs = [x, *others] if skip is None else [x, skip, *others]
    return {
        "x": x, "skip": skip, "level": None if level is None else level.contiguous(),
        "planes": x.shape[0] * channels, "channels": channels, "split": x.shape[1], "groups": groups,
        "per": channels // groups, "pixels": x.shape[2] * x.shape[3], "width": x.shape[3],
        "level_b": channels if level is not None and level.numel() > channels else 0,
        **_steps(x, "x"), **_steps(x if skip is None else skip, "skip"), "FLAT": all(map(_flat, inputs)),
    }  # fmt: skip


def _norm_triton(
    x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    _check(x, skip, level, weight, bias, groups)
    known = _arguments(x, skip, level, groups)
    batch, channels, per = len(x), known["channels"], known["per"]
    grid, side, across, warps = _tile(known["planes"], known["pixels"])
    tile = {"PLANES": side, "PIXELS": across}
    parts = torch.empty(known["planes"], grid[1], 3, dtype=torch.float32, device=x.device)
    only = {name: value for name, value in known.items() if name not in ("level", "level_b", "groups", "per")}
    launch(_plane_parts, grid, warps, parts=parts, **only, **tile)
    moments = torch.empty(batch, groups, 2, dtype=torch.float32, device=x.device)
    width = round_up(per * grid[1])
    rows = max(1, min(512 // width, round_up(batch * groups)))
    launch(
        _gather_groups, (-(-batch * groups // rows),), 4, parts=parts, level=known["level"], moments=moments,
        rows=batch * groups, groups=groups, per=per, many=grid[1], level_b=known["level_b"],
        EPS=EPSILON, ROWS=rows, PARTS=width,
    )  # fmt: skip
    y = torch.empty(batch, channels, *x.shape[2:], dtype=x.dtype, device=x.device)
    affine = {"weight": weight.contiguous(), "bias": bias.contiguous()}
    launch(_norm_silu, grid, warps, **affine, moments=moments, y=y, **known, **tile)
    return y, moments


def _backward_triton(
    g: Tensor, x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    known = _arguments(x, skip, level, moments.shape[1], g)
    grid, side, across, warps = _tile(known["planes"], known["pixels"])
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_skip = torch.empty(0 if skip is None else skip.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(known["planes"], grid[1], 3, dtype=torch.float32, device=x.device)
    common = {
        "g": g, "weight": weight.contiguous(), "bias": bias.contiguous(), "moments": moments.contiguous(), **known,
        "d_x": d_x, "d_skip": None if skip is None else d_skip, **_steps(g, "g"), "PLANES": side, "PIXELS": across,
    }  # fmt: skip
    launch(_norm_silu_gradient, grid, warps, means=None, sums=parts, SUMS="part", **common)
    sums = parts.sum(1).view(len(x), known["channels"], 3)  # in a fixed order, as all of torch's sums over a dimension
    means = _means(sums, weight.float(), moments, known["pixels"]).contiguous()
    launch(_norm_silu_gradient, grid, warps, means=means, sums=None, SUMS="read", **common)
    return d_x, d_skip, sums


# -- operators: Triton on CUDA, plain torch on the CPU

_norm = operator("group_norm_silu", _norm_triton, _norm_aten)
_backward = operator("group_norm_silu_backward", _backward_triton, _backward_aten, gradient_of="group_norm_silu")


@_norm.register_fake
def _(
    x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    _check(x, skip, level, weight, bias, groups)
    y = x.new_empty(x.shape[0], len(weight), *x.shape[2:])
    return y, x.new_empty(x.shape[0], groups, 2, dtype=statistics_dtype(x))


@_backward.register_fake
def _(
    g: Tensor, x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty(x.shape[0], len(weight), 3, dtype=statistics_dtype(x))
    return x.new_empty(x.shape), x.new_empty(0 if skip is None else skip.shape), sums


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], output[1])


def _differentiate(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, skip, level, weight, bias, moments = ctx.saved_tensors
    d_x, d_skip, sums = _backward(g, x, skip, level, weight, bias, moments)
    d_level = None
    if level is not None:
        pixels, groups = x.shape[2] * x.shape[3], moments.shape[1]
        means = _means(sums, weight.to(sums), moments, pixels)
        plain, along, rate = (
            t.repeat_interleave(len(weight) // groups, 1) for t in (means[..., 0], means[..., 1], moments[..., 1])
        )
        d_level = (sums[..., 0] * weight - plain * pixels - along * sums[..., 2]) * rate
        d_level = d_level.sum_to_size(level.shape).to(level.dtype)
    d_weight, d_bias = sums[..., 1].sum(0).to(weight.dtype), sums[..., 0].sum(0).to(bias.dtype)
    return d_x, d_skip if skip is not None else None, d_level, d_weight, d_bias, None


_norm.register_autograd(_differentiate, setup_context=_remember)
