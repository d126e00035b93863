"""A 1x1 map over the channels where it stands alone (hflow spec 2.2): `weight x + bias` at every pixel.

The first map of a level also takes the level's outer map of every element on its way in, which is then no pass of its
own: on CUDA, `x` and that map are read once and the result written once. Up to 16 channels the map is the lanes' own
work; above, and everywhere else, it is torch's convolution.
"""

from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels.channels import (
    Elementwise,
    channel_map,
    check_maps,
    element_map,
    fits,
    flat,
    gathered,
    held,
    in_registers,
    lanes,
    mapped,
    outer,
    pixels_at,
    room,
    steps,
)
from hflow_rt.kernels.dispatch import jit, launch, operator, takes, tl

__all__ = ["mixing", "mixing_reference"]


def mixing(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pre: Elementwise | None = None,
    inverse: bool = False,
) -> Tensor:
    """`weight pre(x) + bias` over the channels of `[B, C, H, W]` or `[B, C]`.

    `weight` is `[C, C]`, or `[C]` for a diagonal, `bias` `[C]`. `pre` holds maps of the shape of `x` and is applied
    latent to image, or where `inverse` image to latent. The result has the type of `x`.
    """
    check_maps(x, weight, bias, pre)
    if takes(x) and fits(x) and in_registers(x, weight):
        shift, log_scale = (None, None) if pre is None else pre
        y: Tensor = _mixing(x, weight, bias, shift, log_scale, inverse)
        return y
    return mixing_reference(x, weight, bias, pre=pre, inverse=inverse)


# -- plain torch


def mixing_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pre: Elementwise | None = None,
    inverse: bool = False,
) -> Tensor:
    """`mixing` in plain torch, differentiable any number of times."""
    return channel_map(element_map(x, pre, inverse), weight, bias)


def _mixing_aten(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, log_scale: Tensor | None, inverse: bool
) -> Tensor:
    pre = None if shift is None or log_scale is None else Elementwise(shift, log_scale)
    return mixing_reference(x, weight, bias, pre=pre, inverse=inverse).contiguous()


def _mixing_backward_aten(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, log_scale: Tensor | None, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    pre = None if shift is None or log_scale is None else Elementwise(shift, log_scale)
    value = element_map(x, pre, inverse)
    d_bias = g.new_empty(0) if bias is None else g.sum((0, 2, 3))
    if weight.dim() == 2:
        d_weight, d_value = torch.einsum("bohw,bihw->oi", g, value), channel_map(g, weight.mT, None)
    else:
        d_weight, d_value = (g * value).sum((0, 2, 3)), channel_map(g, weight, None)
    if shift is None or log_scale is None:
        return d_value.contiguous(), d_weight, d_bias, g.new_empty(0), g.new_empty(0)
    if inverse:
        d_x = d_value * torch.exp(-log_scale.to(x.dtype))
        d_shift, d_log_scale = -d_x, -d_value * value
    else:
        d_x = d_value * torch.exp(log_scale.to(x.dtype))
        d_shift, d_log_scale = d_value, d_value * (value - shift)
    d_shift, d_log_scale = d_shift.to(shift.dtype).contiguous(), d_log_scale.to(log_scale.dtype).contiguous()
    return d_x.contiguous(), d_weight, d_bias, d_shift, d_log_scale


# -- kernels


@jit
def _entered(
    x, pre_shift, pre_log_scale, batch, c, pixel, inside, x_b, x_c, x_p, shift_b, shift_c, shift_p,
    log_b, log_c, log_p, INVERSE: tl.constexpr,
):  # fmt: skip
    """One channel of `pre(x)`."""
    value = tl.load(pixels_at(x, batch, c, pixel, x_b, x_c, x_p), inside, 0.0)
    if pre_shift is not None:
        shift = tl.load(pixels_at(pre_shift, batch, c, pixel, shift_b, shift_c, shift_p), inside, 0.0).to(tl.float32)
        log_scale = tl.load(pixels_at(pre_log_scale, batch, c, pixel, log_b, log_c, log_p), inside, 0.0).to(tl.float32)
        value = outer(value, shift, log_scale, INVERSE)
    return value


@jit
def _mix(
    x, y, weight, bias, pre_shift, pre_log_scale, pixels, channels, x_b, x_c, x_p,
    shift_b, shift_c, shift_p, log_b, log_c, log_p,
    INVERSE: tl.constexpr, FULL: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    out = y + batch.to(tl.int64) * channels * pixels + pixel
    if FULL:
        values = ()
        for c in tl.static_range(C):
            value = _entered(
                x, pre_shift, pre_log_scale, batch, c, pixel, inside, x_b, x_c, x_p,
                shift_b, shift_c, shift_p, log_b, log_c, log_p, INVERSE,
            )  # fmt: skip
            values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005 - Triton adds tuples and unpacks none
        for o in tl.static_range(C):
            result = mapped(values, weight + o * C, 1, C)
            if bias is not None:
                result += tl.load(bias + o)
            tl.store(out + o * pixels, result, inside)
    else:
        c = tl.program_id(2)
        value = _entered(
            x, pre_shift, pre_log_scale, batch, c, pixel, inside, x_b, x_c, x_p,
            shift_b, shift_c, shift_p, log_b, log_c, log_p, INVERSE,
        )  # fmt: skip
        result = value * tl.load(weight + c)
        if bias is not None:
            result += tl.load(bias + c)
        tl.store(out + c * pixels, result, inside)


@jit
def _unenter(
    d_x, d_shift, d_log_scale, value, gradient, pre_shift, pre_log_scale, batch, c, pixel, inside, channels, pixels,
    shift_b, shift_c, shift_p, log_b, log_c, log_p, INVERSE: tl.constexpr,
):  # fmt: skip
    """Store the gradients by `x` and `pre` of one channel, from that by `value = pre(x)`."""
    at = (batch.to(tl.int64) * channels + c) * pixels + pixel
    if pre_shift is not None:
        log_scale = tl.load(pixels_at(pre_log_scale, batch, c, pixel, log_b, log_c, log_p), inside, 0.0).to(tl.float32)
        if INVERSE:
            by_log_scale = -gradient * value
            gradient = gradient * tl.exp(-log_scale)
            by_shift = -gradient
        else:
            shift = tl.load(pixels_at(pre_shift, batch, c, pixel, shift_b, shift_c, shift_p), inside, 0.0)
            by_log_scale = gradient * (value - shift.to(tl.float32))
            by_shift = gradient
            gradient = gradient * tl.exp(log_scale)
        tl.store(d_shift + at, by_shift.to(d_shift.dtype.element_ty), inside)
        tl.store(d_log_scale + at, by_log_scale.to(d_log_scale.dtype.element_ty), inside)
    tl.store(d_x + at, gradient, inside)


@jit
def _mix_gradient(
    g, x, d_x, d_shift, d_log_scale, parts, weight, bias, pre_shift, pre_log_scale, pixels, channels,
    g_b, g_c, g_p, x_b, x_c, x_p, shift_b, shift_c, shift_p, log_b, log_c, log_p,
    INVERSE: tl.constexpr, FULL: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Gradients of `_mix`; of the channel map, this program's part of the sums: weights, then bias."""
    batch = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    part = batch.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if FULL:
        part = parts + part * (C * C + C)
        above = ()
        for o in tl.static_range(C):
            from_above = tl.load(pixels_at(g, batch, o, pixel, g_b, g_c, g_p), inside, 0.0)
            above = above + (from_above,)  # type: ignore[assignment]  # noqa: RUF005
            if bias is not None:
                tl.store(part + C * C + o, tl.sum(from_above, 0))
        for c in tl.static_range(C):
            value = _entered(
                x, pre_shift, pre_log_scale, batch, c, pixel, inside, x_b, x_c, x_p,
                shift_b, shift_c, shift_p, log_b, log_c, log_p, INVERSE,
            )  # fmt: skip
            for o in tl.static_range(C):
                tl.store(part + o * C + c, tl.sum(above[o] * value, 0))
            _unenter(
                d_x, d_shift, d_log_scale, value, mapped(above, weight + c, C, C), pre_shift, pre_log_scale,
                batch, c, pixel, inside, channels, pixels, shift_b, shift_c, shift_p, log_b, log_c, log_p, INVERSE,
            )  # fmt: skip
    else:
        c = tl.program_id(2)
        part = parts + part * channels * 2
        from_above = tl.load(pixels_at(g, batch, c, pixel, g_b, g_c, g_p), inside, 0.0)
        value = _entered(
            x, pre_shift, pre_log_scale, batch, c, pixel, inside, x_b, x_c, x_p,
            shift_b, shift_c, shift_p, log_b, log_c, log_p, INVERSE,
        )  # fmt: skip
        tl.store(part + c, tl.sum(from_above * value, 0))
        tl.store(part + channels + c, tl.sum(from_above, 0))
        _unenter(
            d_x, d_shift, d_log_scale, value, from_above * tl.load(weight + c), pre_shift, pre_log_scale,
            batch, c, pixel, inside, channels, pixels, shift_b, shift_c, shift_p, log_b, log_c, log_p, INVERSE,
        )  # fmt: skip


# -- host

LANES = 512  # pixels of a program
LANES_BACKWARD = 128  # those of one warp, so that its many sums need no other


def _mixing_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, log_scale: Tensor | None, inverse: bool
) -> Tensor:
    x, shift, log_scale = flat(x), flat(shift), flat(log_scale)
    grid, warps, sizes = lanes(x, weight.dim() == 2, LANES, 8)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _mix, grid, warps, x=x, y=y, weight=held(weight), bias=held(bias), pre_shift=shift, pre_log_scale=log_scale,
        **steps(x, "x"), **steps(shift, "shift"), **steps(log_scale, "log"), INVERSE=inverse, **sizes,
    )  # fmt: skip
    return y


def _mixing_backward_triton(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, log_scale: Tensor | None, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g, x, shift, log_scale = flat(g), flat(x), flat(shift), flat(log_scale)
    grid, warps, sizes = lanes(x, weight.dim() == 2, LANES_BACKWARD, 4)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_shift, d_log_scale = room(shift, x), room(log_scale, x)
    parts = torch.empty(grid[0] * grid[1], weight.numel() + x.shape[1], dtype=torch.float32, device=x.device)
    launch(
        _mix_gradient, grid, warps, g=g, x=x, d_x=d_x, d_shift=d_shift, d_log_scale=d_log_scale, parts=parts,
        weight=held(weight), bias=held(bias), pre_shift=shift, pre_log_scale=log_scale,
        **steps(g, "g"), **steps(x, "x"), **steps(shift, "shift"), **steps(log_scale, "log"), INVERSE=inverse, **sizes,
    )  # fmt: skip
    d_weight, d_bias = gathered(parts, weight, bias)
    return d_x, d_weight, d_bias, d_shift, d_log_scale


# -- operators: Triton on CUDA, plain torch on the CPU

_mixing = operator("mixing", _mixing_triton, _mixing_aten)
_mixing_backward = operator("mixing_backward", _mixing_backward_triton, _mixing_backward_aten, gradient_of="mixing")


@_mixing.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, log_scale: Tensor | None, inverse: bool
) -> Tensor:
    return x.new_empty(x.shape)


@_mixing_backward.register_fake
def _(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, log_scale: Tensor | None, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_x, d_weight = x.new_empty(x.shape), x.new_empty(weight.shape)
    return d_x, d_weight, room(bias, x), room(shift, x), room(log_scale, x)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.inverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _mixing_backward(g, *ctx.saved_tensors, ctx.inverse)
    return *(None if one is None else d for one, d in zip(ctx.saved_tensors, gradients, strict=True)), None


_mixing.register_autograd(_differentiate, setup_context=_remember)
