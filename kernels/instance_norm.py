"""Instance normalisation with the unbiased variance and epsilon inside the root (hflow spec 2.6), and what follows it.

    y = leaky(hat * scale + shift), (y + residual) / sqrt(2)        hat = (x - mean) / sqrt(variance + epsilon)

On CUDA a plane of up to 8192 pixels stays in the registers of one program: mean, then the squares about it, then the
result, for one read and one write. Larger planes are cut in parts whose moments are pooled, which reads twice; where
the operator before already knows the moments, they are read once at any size. Nothing but `x` is kept for the
gradient, and its sums over a plane are made in two stages too, so two runs agree bit for bit.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import jit, launch, operator, round_up, takes, tl
from hflow_rt.kernels.moments import EPSILON, gather_moments, moments_reference, new_parts, statistics_dtype

__all__ = ["EPSILON", "SLOPE", "instance_norm", "instance_norm_act", "instance_norm_act_reference"]

SLOPE = 0.1  # of the leaky ReLU, as in every layer of the models


def instance_norm(x: Tensor) -> Tensor:
    """`[B, C, H, W]`: each sample and channel to mean 0 and unit unbiased variance over space. H W must exceed 1."""
    if takes(x):
        y: Tensor = _norm(x, None, None, None, None, False)[0]
        return y
    if x.dtype in (torch.float16, torch.bfloat16):  # statistics in float32
        return instance_norm(x.float()).to(x.dtype)
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPSILON)


def instance_norm_act(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    moments: Tensor | None = None,
    leaky: bool = False,
) -> Tensor:
    """Instance norm of `[B, C, H, W]`, then what is asked for, in this order: style, leaky ReLU, residual.

    `scale` and `shift` `[B, C]` come together; `residual` has the shape of `x` and makes it (y + residual) / sqrt(2).
    `moments` `[B, C, 2]` are those of `x`, as the blurs give them, and spare the kernels reading it twice; gradients
    are those of `x` in full either way. The result has the type of `x`; statistics are float32.
    """
    if (scale is None) != (shift is None):
        raise ValueError("instance_norm_act needs scale and shift together, or neither")
    if takes(x):
        y: Tensor = _norm(x, scale, shift, residual, moments, leaky)[0]
        return y
    return instance_norm_act_reference(x, scale, shift, residual, leaky)


# -- plain torch


def instance_norm_act_reference(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    leaky: bool = False,
) -> Tensor:
    """`instance_norm_act` in plain torch, differentiable any number of times."""
    wide = x.to(statistics_dtype(x))
    variance, mean = torch.var_mean(wide, dim=(2, 3), keepdim=True)
    return _after((wide - mean) / torch.sqrt(variance + EPSILON), scale, shift, residual, leaky).to(x.dtype)


def _after(y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, leaky: bool) -> Tensor:
    if scale is not None and shift is not None:
        y = y * scale[:, :, None, None] + shift[:, :, None, None]
    if leaky:
        y = F.leaky_relu(y, SLOPE)
    return y if residual is None else (y + residual) * math.sqrt(0.5)


def _norm_aten(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    moments: Tensor | None,
    leaky: bool,
) -> tuple[Tensor, Tensor]:
    used = moments_reference(x) if moments is None else moments
    y = _after(_hat(x, used), scale, shift, residual, leaky).to(x.dtype).contiguous()
    return y, used if moments is None else moments.new_empty(0)


def _hat(x: Tensor, moments: Tensor) -> Tensor:
    return (x.to(moments.dtype) - moments[..., :1, None]) * moments[..., 1:, None]


def _norm_backward_aten(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor,
    leaky: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hat = _hat(x, moments)
    wide = g.to(moments.dtype) * (math.sqrt(0.5) if residual else 1.0)
    d_residual = wide.to(g.dtype).contiguous() if residual else g.new_empty(0)
    if leaky:
        wide = torch.where(_after(hat, scale, shift, None, False) > 0, wide, SLOPE * wide)
    sums = torch.stack([wide.sum((2, 3)), (wide * hat).sum((2, 3))], 2)
    pixels = x.shape[2] * x.shape[3]
    wide = wide - sums[..., :1, None] / pixels - hat * sums[..., 1:, None] / (pixels - 1)
    if scale is not None:
        wide = wide * scale[:, :, None, None]
    return (wide * moments[..., 1:, None]).to(x.dtype).contiguous(), sums, d_residual


# -- kernels: a tile is some planes whole, or a part of one


@jit
def _pixels_at(base, pixel, width, step_b, step_c, step_h, step_w, batch, channel, FLAT: tl.constexpr):
    """Where pixels of planes are; planes in int64, because a tensor may hold more than 2^31 numbers."""
    plane = base + batch.to(tl.int64) * step_b + channel.to(tl.int64) * step_c
    if FLAT:
        return plane + pixel * step_w
    return plane + (pixel // width) * step_h + (pixel % width) * step_w


@jit
def _style_at(scale, shift, batch, channel, step_b, step_c, inside):
    at = batch.to(tl.int64) * step_b + channel * step_c
    return tl.load(scale + at, inside, 0.0).to(tl.float32), tl.load(shift + at, inside, 0.0).to(tl.float32)


@jit
def _part_moments(
    x, parts, planes, channels, pixels, width, step_b, step_c, step_h, step_w,
    FLAT: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Count, mean and squares about the mean of one part of one plane."""
    plane = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    at = _pixels_at(x, pixel, width, step_b, step_c, step_h, step_w, plane // channels, plane % channels, FLAT)
    value = tl.load(at, inside, 0.0).to(tl.float32)
    count = tl.minimum(pixels - tl.program_id(1) * PIXELS, PIXELS) * 1.0
    mean = tl.sum(value, 0) / count
    off = tl.where(inside, value - mean, 0.0)
    out = parts + (plane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(out, count)
    tl.store(out + 1, mean)
    tl.store(out + 2, tl.sum(off * off, 0))


@jit
def _normalise(
    x, y, moments, scale, shift, residual, planes, channels, pixels, width,
    step_b, step_c, step_h, step_w, style_b, style_c, residual_b, residual_c, residual_h, residual_w,
    KNOWN: tl.constexpr, LEAKY: tl.constexpr, FLAT: tl.constexpr, EPS: tl.constexpr, SLOPE: tl.constexpr,
    PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """All of `instance_norm_act`; the moments are read where `KNOWN`, else the tile holds whole planes and tells."""
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    batch = plane // channels
    channel = plane % channels
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (plane < planes) & (pixel < pixels)
    at = _pixels_at(x, pixel, width, step_b, step_c, step_h, step_w, batch, channel, FLAT)
    value = tl.load(at, inside, 0.0).to(tl.float32)
    told = moments + plane.to(tl.int64) * 2
    if KNOWN:
        mean = tl.load(told, plane < planes, 0.0)
        rate = tl.load(told + 1, plane < planes, 0.0)
        off = value - mean
    else:
        mean = tl.expand_dims(tl.sum(value, 1), 1) / (pixels * 1.0)
        off = tl.where(inside, value - mean, 0.0)
        variance = tl.expand_dims(tl.sum(off * off, 1), 1) / tl.maximum(pixels - 1.0, 1.0)
        rate = 1.0 / tl.sqrt(variance + EPS)
        tl.store(told, mean, plane < planes)
        tl.store(told + 1, rate, plane < planes)
    result = off * rate
    if scale is not None:
        factor, offset = _style_at(scale, shift, batch, channel, style_b, style_c, plane < planes)
        result = result * factor + offset
    if LEAKY:
        result = tl.where(result > 0.0, result, result * SLOPE)
    if residual is not None:
        at = _pixels_at(
            residual, pixel, width, residual_b, residual_c, residual_h, residual_w, batch, channel, FLAT
        )  # fmt: skip
        result = (result + tl.load(at, inside, 0.0).to(tl.float32)) * 0.7071067811865476
    tl.store(y + plane.to(tl.int64) * pixels + pixel, result.to(y.dtype.element_ty), inside)


@jit
def _gradient(
    g, x, d_x, d_residual, moments, sums, scale, shift, planes, channels, pixels, width,
    step_b, step_c, step_h, step_w, style_b, style_c, g_b, g_c, g_h, g_w,
    SUMS: tl.constexpr, LEAKY: tl.constexpr, FLAT: tl.constexpr, SLOPE: tl.constexpr,
    PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Gradients by `x` and residual. `sums`, of g and g hat, are those of style too.

    `SUMS` is "make" where the tile holds whole planes, "part" to only write those of a part, "read" to use them.
    """
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    batch = plane // channels
    channel = plane % channels
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    real = plane < planes
    inside = real & (pixel < pixels)
    at = _pixels_at(x, pixel, width, step_b, step_c, step_h, step_w, batch, channel, FLAT)
    value = tl.load(at, inside, 0.0).to(tl.float32)
    at = _pixels_at(g, pixel, width, g_b, g_c, g_h, g_w, batch, channel, FLAT)
    above = tl.load(at, inside, 0.0).to(tl.float32)
    mean = tl.load(moments + plane.to(tl.int64) * 2, real, 0.0)
    rate = tl.load(moments + plane.to(tl.int64) * 2 + 1, real, 0.0)
    hat = (value - mean) * rate
    out = plane.to(tl.int64) * pixels + pixel
    if d_residual is not None:
        above = above * 0.7071067811865476
        if SUMS != "part":
            tl.store(d_residual + out, above.to(d_residual.dtype.element_ty), inside)
    if scale is not None:
        factor, offset = _style_at(scale, shift, batch, channel, style_b, style_c, real)
    if LEAKY:
        if scale is not None:
            above = tl.where(hat * factor + offset > 0.0, above, above * SLOPE)
        else:
            above = tl.where(hat > 0.0, above, above * SLOPE)
    if SUMS == "read":
        plain = tl.load(sums + plane.to(tl.int64) * 2, real, 0.0)
        along = tl.load(sums + plane.to(tl.int64) * 2 + 1, real, 0.0)
    else:
        plain = tl.expand_dims(tl.sum(above, 1), 1)  # what is outside was loaded as 0
        along = tl.expand_dims(tl.sum(above * hat, 1), 1)
        to = sums + (plane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(to, plain, real)
        tl.store(to + 1, along, real)
    if SUMS != "part":
        result = above - plain / (pixels * 1.0) - hat * (along / tl.maximum(pixels - 1.0, 1.0))
        if scale is not None:
            result = result * factor
        tl.store(d_x + out, (result * rate).to(d_x.dtype.element_ty), inside)


# -- host

WHOLE = 8192  # pixels of a plane that one program of 16 warps holds: 16 a thread, twice that in the gradient
PART = 4096


def _tile(planes: int, pixels: int) -> tuple[tuple[int, int], int, int, int]:
    """Grid, planes and pixels a tile, and warps for 16 numbers a thread."""
    if pixels > WHOLE:
        return (planes, -(-pixels // PART)), 1, PART, max(1, PART // 512)
    width = round_up(pixels)
    side = max(1, min(1024 // width, round_up(planes)))
    return (-(-planes // side), 1), side, width, max(1, side * width // 512)


def _steps(x: Tensor, prefix: str) -> dict[str, int]:
    return dict(zip((f"{prefix}_b", f"{prefix}_c", f"{prefix}_h", f"{prefix}_w"), x.stride(), strict=True))


def _flat(x: Tensor) -> bool:
    """Whether the pixels of a plane lie at equal distances, so that no row need be found by division."""
    return x.stride(2) == x.shape[3] * x.stride(3) or x.shape[2] == 1


def _style(scale: Tensor | None, shift: Tensor | None) -> dict[str, Any]:
    if scale is None or shift is None:
        return {"scale": None, "shift": None, "style_b": 0, "style_c": 0}
    if scale.stride() != shift.stride():
        scale, shift = scale.contiguous(), shift.contiguous()
    return {"scale": scale, "shift": shift, "style_b": scale.stride(0), "style_c": scale.stride(1)}


def _check(x: Tensor, scale: Tensor | None, shift: Tensor | None, *alike: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"instance norm needs [B, C, H, W], not {list(x.shape)}")
    for style in (scale, shift):
        if style is not None and style.shape != x.shape[:2]:
            raise ValueError(f"scale and shift must be {list(x.shape[:2])}, not {list(style.shape)}")
    for other in alike:
        if other is not None and other.shape != x.shape:
            raise ValueError(f"the residual must be {list(x.shape)}, not {list(other.shape)}")


def _norm_triton(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    moments: Tensor | None,
    leaky: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, scale, shift, residual)
    batch, channels, height, width = x.shape
    planes, pixels = batch * channels, height * width
    grid, side, across, warps = _tile(planes, pixels)
    flat = _flat(x) and (residual is None or _flat(residual))
    sizes = {"planes": planes, "channels": channels, "pixels": pixels, "width": width}
    if moments is not None:
        used = moments.contiguous()
    elif grid[1] == 1:
        used = torch.empty(batch, channels, 2, dtype=torch.float32, device=x.device)
    else:
        parts = new_parts(x, grid[1])
        launch(_part_moments, grid, warps, x=x, parts=parts, **sizes, **_steps(x, "step"), FLAT=_flat(x), PIXELS=across)
        used = gather_moments(parts, batch, channels)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _normalise, grid, warps, x=x, y=y, moments=used, residual=residual, **_style(scale, shift), **sizes,
        **_steps(x, "step"), **_steps(x if residual is None else residual, "residual"),
        KNOWN=moments is not None or grid[1] > 1, LEAKY=leaky, FLAT=flat, EPS=EPSILON, SLOPE=SLOPE,
        PLANES=side, PIXELS=across,
    )  # fmt: skip
    return y, used if moments is None else moments.new_empty(0)


def _norm_backward_triton(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor,
    leaky: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    planes, pixels = batch * channels, height * width
    grid, side, across, warps = _tile(planes, pixels)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_residual = torch.empty(x.shape if residual else 0, dtype=g.dtype, device=x.device)
    sums = torch.empty(planes, grid[1], 2, dtype=torch.float32, device=x.device)
    common = {
        "g": g, "x": x, "d_x": d_x, "d_residual": d_residual if residual else None, "moments": moments.contiguous(),
        **_style(scale, shift), "planes": planes, "channels": channels, "pixels": pixels, "width": width,
        **_steps(x, "step"), **_steps(g, "g"),
        "LEAKY": leaky, "FLAT": _flat(x) and _flat(g), "SLOPE": SLOPE, "PLANES": side, "PIXELS": across,
    }  # fmt: skip
    if grid[1] == 1:
        launch(_gradient, grid, warps, sums=sums, SUMS="make", **common)
        return d_x, sums.view(batch, channels, 2), d_residual
    launch(_gradient, grid, warps, sums=sums, SUMS="part", **common)
    sums = sums.sum(1)  # in a fixed order, as all of torch's sums over a dimension
    launch(_gradient, grid, warps, sums=sums, SUMS="read", **common)
    return d_x, sums.view(batch, channels, 2), d_residual


# -- operators: Triton on CUDA, plain torch on the CPU

_norm = operator("instance_norm_act", _norm_triton, _norm_aten)
_norm_backward = operator(
    "instance_norm_act_backward", _norm_backward_triton, _norm_backward_aten, gradient_of="instance_norm_act"
)


@_norm.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    moments: Tensor | None,
    leaky: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, scale, shift, residual)
    made = (*x.shape[:2], 2) if moments is None else (0,)
    return x.new_empty(x.shape), x.new_empty(made, dtype=statistics_dtype(x))


@_norm_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor,
    leaky: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty((*x.shape[:2], 2), dtype=statistics_dtype(x))
    return x.new_empty(x.shape), sums, g.new_empty(x.shape if residual else 0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, shift, residual, moments, ctx.leaky = inputs
    ctx.residual = residual is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, scale, shift, output[1] if moments is None else moments)


def _differentiate(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, moments = ctx.saved_tensors
    d_x, sums, d_residual = _norm_backward(g, x, scale, shift, moments, ctx.leaky, ctx.residual)
    d_scale = None if scale is None else sums[..., 1].to(scale.dtype)
    d_shift = None if shift is None else sums[..., 0].to(shift.dtype)
    return d_x, d_scale, d_shift, d_residual if ctx.residual else None, None, None


_norm.register_autograd(_differentiate, setup_context=_remember)
