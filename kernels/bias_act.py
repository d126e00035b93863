"""A bias a channel and leaky ReLU with a gain, and a clamp on request, in one pass (inrgan spec 15b).

y = gain * leaky(x + bias)        with a clamp c, min(max(y, -c), c)

Its gradient needs nothing but y, whose signs are those of `x + bias`, and is a linear map with a kernel of its own:
differentiable any number of times.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import jit, launch, operator, round_up, takes, tl
from hflow_rt.kernels.moments import statistics_dtype

__all__ = ["GAIN", "SLOPE", "backward", "bias_act", "bias_act_reference", "tiles"]

SLOPE, GAIN = 0.2, math.sqrt(2)


def bias_act(
    x: Tensor, bias: Tensor | None = None, *, slope: float = SLOPE, gain: float = GAIN, clamp: float | None = None
) -> Tensor:
    """`[B, C, ...]` of x `[B, C, ...]` and bias `[C]`, in the type of x. slope: within 0 .. 1; gain, clamp: above 0."""
    if takes(x):
        y: Tensor = _act(x, bias, slope, gain, clamp)
        return y
    return bias_act_reference(x, bias, slope, gain, clamp)


# -- plain torch


def bias_act_reference(x: Tensor, bias: Tensor | None, slope: float, gain: float, clamp: float | None) -> Tensor:
    """`bias_act` in plain torch."""
    if bias is not None:
        x = x + bias.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)
    y = gain * F.leaky_relu(x, slope)
    return y if clamp is None else y.clamp(-clamp, clamp)


def _act_aten(x: Tensor, bias: Tensor | None, slope: float, gain: float, clamp: float | None) -> Tensor:
    return bias_act_reference(x.to(statistics_dtype(x)), bias, slope, gain, clamp).to(x.dtype)


def _backward_aten(
    g: Tensor, y: Tensor, slope: float, gain: float, clamp: float | None, sums: bool
) -> tuple[Tensor, Tensor]:
    wide = g.to(statistics_dtype(g))
    d = wide * torch.where(y > 0, gain, gain * slope)
    d = d if clamp is None else d * (y.abs() < clamp)
    by_channel = d.sum([0, *range(2, d.dim())]) if sums else d.new_empty(0)
    return d.to(g.dtype, copy=True), by_channel


# -- kernels


@jit
def _act_kernel(
    x, bias, y, planes, channels, pixels, slope, gain, clamp,
    CLAMPS: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (plane < planes) & (pixel < pixels)
    at = plane.to(tl.int64) * pixels + pixel
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + plane % channels, plane < planes, 0.0).to(tl.float32)
    value = tl.where(value > 0.0, value, value * slope) * gain
    if CLAMPS:
        value = tl.minimum(tl.maximum(value, -clamp), clamp)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


@jit
def _act_gradient(
    g, y, d, parts, planes, pixels, slope, gain, clamp,
    CLAMPS: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """And what parts of planes add to the sums."""
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (plane < planes) & (pixel < pixels)
    at = plane.to(tl.int64) * pixels + pixel
    value = tl.load(y + at, inside, 0.0).to(tl.float32)
    result = tl.load(g + at, inside, 0.0).to(tl.float32) * tl.where(value > 0.0, gain, gain * slope)
    if CLAMPS:
        result = tl.where(tl.abs(value) < clamp, result, 0.0)
    tl.store(d + at, result.to(d.dtype.element_ty), inside)
    if parts is not None:
        to = parts + plane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(to, tl.expand_dims(tl.sum(result, 1), 1), plane < planes)


# -- host


def tiles(planes: int, pixels: int, most: int = 1024) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of 4 warps for planes of so many pixels: several small ones, or a part of a large one."""
    across = min(most, round_up(pixels))
    down = max(1, min(most // across, round_up(planes)))
    return (-(-planes // down), -(-pixels // across)), {"PLANES": down, "PIXELS": across}


def _check(x: Tensor, bias: Tensor | None) -> None:
    if x.dim() < 2:
        raise ValueError(f"an activation needs [B, C, ...], not {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"the bias must be [{x.shape[1]}], not {list(bias.shape)}")


def _act_triton(x: Tensor, bias: Tensor | None, slope: float, gain: float, clamp: float | None) -> Tensor:
    _check(x, bias)
    planes, pixels = x.shape[0] * x.shape[1], math.prod(x.shape[2:])
    grid, tile = tiles(planes, pixels)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _act_kernel, grid, 4, x=x.contiguous(), bias=None if bias is None else bias.contiguous(), y=y, planes=planes,
        channels=x.shape[1], pixels=pixels, slope=slope, gain=gain, clamp=clamp or 0.0, CLAMPS=clamp is not None,
        **tile,
    )  # fmt: skip
    return y


def _backward_triton(
    g: Tensor, y: Tensor, slope: float, gain: float, clamp: float | None, sums: bool
) -> tuple[Tensor, Tensor]:
    planes, pixels = y.shape[0] * y.shape[1], math.prod(y.shape[2:])
    grid, tile = tiles(planes, pixels)
    d = torch.empty(y.shape, dtype=g.dtype, device=y.device)
    parts = torch.empty(*y.shape[:2], grid[1], dtype=torch.float32, device=y.device) if sums else None
    launch(
        _act_gradient, grid, 4, g=g.contiguous(), y=y.contiguous(), d=d, parts=parts, planes=planes, pixels=pixels,
        slope=slope, gain=gain, clamp=clamp or 0.0, CLAMPS=clamp is not None, **tile,
    )  # fmt: skip
    # in a fixed order, as all of torch's sums over a dimension
    return d, torch.empty(0, dtype=torch.float32, device=y.device) if parts is None else parts.sum((0, 2))


# -- operators: Triton on CUDA, plain torch on the CPU

_act = operator("bias_act", _act_triton, _act_aten)
backward = operator("bias_act_backward", _backward_triton, _backward_aten, gradient_of="bias_act")


@_act.register_fake
def _(x: Tensor, bias: Tensor | None, slope: float, gain: float, clamp: float | None) -> Tensor:
    _check(x, bias)
    return x.new_empty(x.shape)


@backward.register_fake
def _(g: Tensor, y: Tensor, slope: float, gain: float, clamp: float | None, sums: bool) -> tuple[Tensor, Tensor]:
    return g.new_empty(y.shape), g.new_empty(y.shape[1] if sums else 0, dtype=statistics_dtype(g))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *ctx.numbers = inputs
    ctx.save_for_backward(bias, output)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    bias, y = ctx.saved_tensors
    d, sums = backward(g, y, *ctx.numbers, bias is not None)
    return d, None if bias is None else sums.to(bias.dtype), None, None, None


_act.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, *ctx.numbers = inputs
    ctx.save_for_backward(y)


def _differentiate_backward(ctx: Any, above: Tensor, above_sums: Tensor) -> tuple[Tensor | None, ...]:
    (y,), (*numbers, sums) = ctx.saved_tensors, ctx.numbers
    if sums:
        above = above + above_sums.view(-1, *[1] * (y.dim() - 2)).to(above.dtype)
    return backward(above, y, *numbers, False)[0], None, None, None, None, None


backward.register_autograd(_differentiate_backward, setup_context=_remember_backward)
