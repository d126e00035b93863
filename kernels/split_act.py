"""The end of a layer that was computed in two parts, one of them before enlarging, in one pass (inrgan spec 15c).

y = gain * leaky(high + enlarged(low) + bias)

`low` has half the side: each pixel becomes four, or what lies between pixels is interpolated, corners on corners. The
gradient of the activation is that of `bias_act`, and `low` gets what its pixels gave, gathered in a fixed order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.bias_act import GAIN, SLOPE, backward, bias_act_reference, tiles
from hflow_rt.kernels.dispatch import jit, launch, operator, takes, tl
from hflow_rt.kernels.moments import statistics_dtype

__all__ = ["enlarged", "split_act", "split_act_reference"]

MODES = ("nearest", "bilinear")
_TAPS = 5  # pixels of a line, at most, that one of half as many gives to


def split_act(high: Tensor, low: Tensor, bias: Tensor, mode: str, gain: float = GAIN) -> Tensor:
    """`[B, C, 2n, 2n]` of high `[B, C, 2n, 2n]`, low `[B, C, n, n]`, n >= 2, and bias `[C]`.

    mode: one of `MODES`. gain: above 0.
    """
    if takes(high):
        y: Tensor = _split(high, low, bias, mode, gain)
        return y
    return split_act_reference(high, low, bias, mode, gain)


# -- plain torch


def enlarged(x: Tensor, mode: str) -> Tensor:
    """`[B, C, n, n]` to `[B, C, 2n, 2n]`; bilinear keeps the corners where they are.

    Bilinear is two products, which ONNX Runtime computes three times as fast as its Resize.
    """
    if mode == "nearest":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    side = x.shape[-1]
    pixels = torch.arange(2 * side, device=x.device)
    off = (pixels[:, None] * (side - 1) - pixels[:side] * (2 * side - 1)).abs()  # from each of the shorter line, exact
    doubled = (1 - off.to(x.dtype) / (2 * side - 1)).clamp(min=0)
    return doubled @ x @ doubled.mT


def split_act_reference(high: Tensor, low: Tensor, bias: Tensor, mode: str, gain: float = GAIN) -> Tensor:
    """`split_act` in plain torch."""
    return bias_act_reference(high + enlarged(low, mode), bias, SLOPE, gain, None)


def _split_aten(high: Tensor, low: Tensor, bias: Tensor, mode: str, gain: float = GAIN) -> Tensor:
    wide = statistics_dtype(high)
    return split_act_reference(high.to(wide), low.to(wide), bias.to(wide), mode, gain).to(high.dtype)


def _gathered_aten(d: Tensor, side: int, mode: str) -> Tensor:
    batch, channels = d.shape[:2]
    if mode == "nearest":
        return d.reshape(batch, channels, side, 2, side, 2).sum((3, 5))
    sizes = [2 * side, 2 * side], [batch, channels, side, side]
    found: Tensor = torch.ops.aten.upsample_bilinear2d_backward(d.contiguous(), *sizes, True)
    return found


# -- kernels


@jit
def _between(position, side):
    """Where a pixel of a line of `2 side` is on one of `side`: the pixel before it, and the way to the next; exact."""
    at = position * (side - 1)
    return at // (2 * side - 1), (at % (2 * side - 1)).to(tl.float32) / (2 * side - 1)


@jit
def _split_kernel(
    high, low, bias, y, planes, channels, side, gain,
    BILINEAR: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (plane < planes) & (pixel < 4 * side * side)
    row, column = pixel // (2 * side), pixel % (2 * side)
    base = low + plane.to(tl.int64) * side * side
    if BILINEAR:
        top, down = _between(row, side)
        left, right = _between(column, side)
        below, beside = tl.minimum(top + 1, side - 1), tl.minimum(left + 1, side - 1)
        a = tl.load(base + top * side + left, inside, 0.0).to(tl.float32)
        b = tl.load(base + top * side + beside, inside, 0.0).to(tl.float32)
        c = tl.load(base + below * side + left, inside, 0.0).to(tl.float32)
        d = tl.load(base + below * side + beside, inside, 0.0).to(tl.float32)
        above, under = a + right * (b - a), c + right * (d - c)
        value = above + down * (under - above)
    else:
        value = tl.load(base + row // 2 * side + column // 2, inside, 0.0).to(tl.float32)
    at = plane.to(tl.int64) * (4 * side * side) + pixel
    value += tl.load(high + at, inside, 0.0).to(tl.float32)
    value += tl.load(bias + plane % channels, plane < planes, 0.0).to(tl.float32)
    value = tl.where(value > 0.0, value, value * 0.2) * gain
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


@jit
def _first(position, side):
    """The first pixel of a line of `2 side` that one of a line of `side` gives to."""
    return tl.where(position > 0, (position - 1) * (2 * side - 1) // (side - 1) + 1, 0)


@jit
def _given(position, of, side):
    """How much of a pixel of a line of `side` the pixel at `position` of one of `2 side` has."""
    off = tl.abs(position * (side - 1) - of * (2 * side - 1))
    share = 1.0 - off.to(tl.float32) / (2 * side - 1)
    return tl.where(position < 2 * side, tl.maximum(share, 0.0), 0.0)


@jit
def _gather_kernel(
    d, d_low, planes, side, BILINEAR: tl.constexpr, TAPS: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr
):
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (plane < planes) & (pixel < side * side)
    row, column = pixel // side, pixel % side
    base = d + plane.to(tl.int64) * (4 * side * side)
    total = tl.zeros_like(row + plane).to(tl.float32)
    if BILINEAR:
        top, left = _first(row, side), _first(column, side)
        for down in range(TAPS):
            for right in tl.static_range(TAPS):
                share = _given(top + down, row, side) * _given(left + right, column, side)
                at = base + (top + down) * (2 * side) + left + right
                total += share * tl.load(at, inside & (share > 0.0), 0.0).to(tl.float32)
    else:
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                at = base + (2 * row + down) * (2 * side) + 2 * column + right
                total += tl.load(at, inside, 0.0).to(tl.float32)
    tl.store(d_low + plane.to(tl.int64) * (side * side) + pixel, total.to(d_low.dtype.element_ty), inside)


# -- host


def _check(high: Tensor, low: Tensor, bias: Tensor, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"enlarging is {' or '.join(MODES)}, not {mode}")
    batch, channels, side = low.shape[:3]
    if low.dim() != 4 or low.shape[3] != side or side < 2:
        raise ValueError(f"the part before enlarging must be [B, C, n, n], n >= 2, not {list(low.shape)}")
    if tuple(high.shape) != (batch, channels, 2 * side, 2 * side) or high.dtype != low.dtype:
        raise ValueError(f"the other part must be {[batch, channels, 2 * side, 2 * side]}, not {list(high.shape)}")
    if tuple(bias.shape) != (channels,):
        raise ValueError(f"the bias must be [{channels}], not {list(bias.shape)}")


def _split_triton(high: Tensor, low: Tensor, bias: Tensor, mode: str, gain: float = GAIN) -> Tensor:
    _check(high, low, bias, mode)
    batch, channels, side, _ = low.shape
    grid, tile = tiles(batch * channels, 4 * side * side)
    y = torch.empty(high.shape, dtype=high.dtype, device=high.device)
    launch(
        _split_kernel, grid, 4, high=high.contiguous(), low=low.contiguous(), bias=bias.contiguous(), y=y,
        planes=batch * channels, channels=channels, side=side, gain=gain, BILINEAR=mode == "bilinear", **tile,
    )  # fmt: skip
    return y


def _gathered_triton(d: Tensor, side: int, mode: str) -> Tensor:
    batch, channels = d.shape[:2]
    grid, tile = tiles(batch * channels, side * side, 512)
    d_low = torch.empty(batch, channels, side, side, dtype=d.dtype, device=d.device)
    launch(
        _gather_kernel, grid, 4, d=d.contiguous(), d_low=d_low, planes=batch * channels, side=side,
        BILINEAR=mode == "bilinear", TAPS=_TAPS, **tile,
    )  # fmt: skip
    return d_low


# -- operators: Triton on CUDA, plain torch on the CPU

_split = operator("split_act", _split_triton, _split_aten)
_gathered = operator("split_act_backward", _gathered_triton, _gathered_aten, gradient_of="split_act")


@_split.register_fake
def _(high: Tensor, low: Tensor, bias: Tensor, mode: str, gain: float = GAIN) -> Tensor:
    _check(high, low, bias, mode)
    return high.new_empty(high.shape)


@_gathered.register_fake
def _(d: Tensor, side: int, mode: str) -> Tensor:
    return d.new_empty(d.shape[0], d.shape[1], side, side)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, low, bias, ctx.mode, ctx.gain = inputs
    ctx.side = low.shape[2]
    ctx.save_for_backward(bias, output)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    bias, y = ctx.saved_tensors
    d, sums = backward(g.to(statistics_dtype(g)), y, SLOPE, ctx.gain, None, True)  # rounded after it was gathered
    return d.to(g.dtype), _gathered(d, ctx.side, ctx.mode).to(g.dtype), sums.to(bias.dtype), None, None


_split.register_autograd(_differentiate, setup_context=_remember)


def _remember_mode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, ctx.mode = inputs


_gathered.register_autograd(lambda ctx, above: (enlarged(above, ctx.mode), None, None), setup_context=_remember_mode)
