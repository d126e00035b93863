"""Weights of a layer for each image from a style of low rank, in one pass (inrgan spec 2.4 and 15a).

style = [U | V], U [C_out, r], V [r, C_in]        T = weight * (1 + gain * U V)
result = T / (|T| + 1e-8) by row, times a factor a column if there is one

A program holds whole rows in registers. The gradient is a kernel too, and its own gradient, which a penalty on path
lengths asks for, is plain torch.
"""

from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels.dispatch import jit, launch, operator, round_up, takes, tl
from hflow_rt.kernels.moments import statistics_dtype

__all__ = ["modulated_weights", "modulated_weights_reference", "reciprocal"]

LARGEST = 4096  # columns of a row that a program holds
_LARGE = 1e8  # 1 / 1e-8


def modulated_weights(
    style: Tensor, weight: Tensor, rank: int, gain: float = 1.0, columns: Tensor | None = None
) -> Tensor:
    """`[B, C_out, C_in]` of a style `[B, (C_out + C_in) rank]`, weights `[C_out, C_in]` and factors `[B, C_in]`."""
    if takes(style) and weight.shape[1] <= LARGEST:
        made: Tensor = _generate(style, weight, columns, rank, gain)
        return made
    return modulated_weights_reference(style, weight, columns, rank, gain)


# -- plain torch


def reciprocal(x: Tensor) -> Tensor:
    """`1 / (x + 1e-8)`, so written that no exporter takes the addition of almost nothing for one of nothing."""
    return _LARGE / (_LARGE * x + 1)


def modulated_weights_reference(
    style: Tensor, weight: Tensor, columns: Tensor | None, rank: int, gain: float
) -> Tensor:
    """`modulated_weights` in plain torch."""
    left, right = halves(style, weight, rank)
    product = left @ right
    made = weight * (1 + (product if gain == 1 else gain * product))
    made = made * reciprocal((made * made).sum(2, keepdim=True).sqrt())
    return made if columns is None else made * columns[:, None]


def halves(style: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U `[B, C_out, r]` and V `[B, r, C_in]`."""
    c_out, c_in = weight.shape
    return style[:, : c_out * rank].reshape(-1, c_out, rank), style[:, c_out * rank :].reshape(-1, rank, c_in)


def _generate_aten(style: Tensor, weight: Tensor, columns: Tensor | None, rank: int, gain: float) -> Tensor:
    made = modulated_weights_reference(style.to(statistics_dtype(style)), weight, columns, rank, gain)
    return made.to(_type(style, weight, columns))


def _backward_aten(
    g: Tensor, style: Tensor, weight: Tensor, columns: Tensor | None, rank: int, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By style, weight and columns."""
    left, right = halves(style.to(statistics_dtype(style)), weight, rank)
    factor = 1 + gain * (left @ right)
    made = weight * factor
    length = made.square().sum(2, keepdim=True).sqrt()
    short = 1 / (length + 1e-8)
    above = g if columns is None else g * columns[:, None]
    slope = short * (above - made * ((above * made).sum(2, keepdim=True) * short / length))
    product = gain * slope * weight
    d_style = torch.cat([(product @ right.mT).flatten(1), (left.mT @ product).flatten(1)], 1)
    d_columns = g.new_empty(0) if columns is None else (g * made * short).sum(1).to(columns.dtype)
    return d_style.to(style.dtype), (slope * factor).sum(0).to(weight.dtype), d_columns


# -- kernels


@jit
def _modulated(style, weight, image, row, column, inside, c_out, c_in, rank, gain):
    """Rows of `weight`, and what they are multiplied by."""
    at = style + image.to(tl.int64) * (c_out + c_in) * rank
    total = tl.zeros_like(row + column).to(tl.float32)
    for k in range(rank):
        left = tl.load(at + row * rank + k, row < c_out, 0.0).to(tl.float32)
        right = tl.load(at + c_out * rank + k * c_in + column, column < c_in, 0.0).to(tl.float32)
        total += left * right
    shared = tl.load(weight + row * c_in + column, inside, 0.0).to(tl.float32)
    return shared, 1.0 + gain * total


@jit
def _generate_kernel(style, weight, columns, made, c_out, c_in, rank, gain, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    image = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < c_out) & (column < c_in)
    shared, factor = _modulated(style, weight, image, row, column, inside, c_out, c_in, rank, gain)
    value = shared * factor
    value = value / (tl.sqrt(tl.expand_dims(tl.sum(value * value, 1), 1)) + 1e-8)
    if columns is not None:
        value *= tl.load(columns + image.to(tl.int64) * c_in + column, column < c_in, 0.0).to(tl.float32)
    out = made + image.to(tl.int64) * c_out * c_in + row * c_in + column
    tl.store(out, value.to(made.dtype.element_ty), inside)


@jit
def _generate_gradient(
    g, style, weight, columns, d_product, d_weight, images, c_out, c_in, rank, gain,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """By `gain * U V` of each image, and by the weights, summed over the images one after the other."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < c_out) & (column < c_in)
    total = tl.zeros_like(row + column).to(tl.float32)
    for image in range(images):
        at = tl.full((), image, tl.int64) * c_out * c_in + row * c_in + column
        shared, factor = _modulated(
            style, weight, tl.full((), image, tl.int64), row, column, inside, c_out, c_in, rank, gain
        )
        above = tl.load(g + at, inside, 0.0).to(tl.float32)
        if columns is not None:
            where = columns + tl.full((), image, tl.int64) * c_in + column
            above *= tl.load(where, column < c_in, 0.0).to(tl.float32)
        value = shared * factor
        length = tl.sqrt(tl.expand_dims(tl.sum(value * value, 1), 1))
        short = 1.0 / (length + 1e-8)
        along = tl.expand_dims(tl.sum(above * value, 1), 1)
        # of a row of nothing, or beyond the last one, the length is no divisor
        slope = short * (above - value * (along * short / tl.where(length > 0.0, length, 1.0)))
        total += slope * factor
        tl.store(d_product + at, slope * shared, inside)
    tl.store(d_weight + row * c_in + column, total, inside)


# -- host


def _tile(weight: Tensor, numbers: int) -> tuple[int, dict[str, int]]:
    """Programs and tile for `numbers` in all, of whole rows."""
    c_out, c_in = weight.shape
    across = round_up(c_in)
    rows = max(1, min(numbers // across, round_up(c_out)))
    return -(-c_out // rows), {"ROWS": rows, "COLUMNS": across}


def _check(style: Tensor, weight: Tensor, columns: Tensor | None, rank: int) -> None:
    c_out, c_in = weight.shape
    if style.dim() != 2 or style.shape[1] != (c_out + c_in) * rank:
        raise ValueError(f"a style must be [B, {(c_out + c_in) * rank}], not {list(style.shape)}")
    if columns is not None and tuple(columns.shape) != (len(style), c_in):
        raise ValueError(f"factors of columns must be {[len(style), c_in]}, not {list(columns.shape)}")


def _arguments(style: Tensor, weight: Tensor, columns: Tensor | None, rank: int, gain: float) -> dict[str, Any]:
    _check(style, weight, columns, rank)
    c_out, c_in = weight.shape
    packed = {"style": style.contiguous(), "weight": weight.contiguous()}
    packed_columns = None if columns is None else columns.contiguous()
    return {**packed, "columns": packed_columns, "c_out": c_out, "c_in": c_in, "rank": rank, "gain": gain}


def _generate_triton(style: Tensor, weight: Tensor, columns: Tensor | None, rank: int, gain: float) -> Tensor:
    known = _arguments(style, weight, columns, rank, gain)
    programs, tile = _tile(weight, 4096)
    made = torch.empty(len(style), *weight.shape, dtype=_type(style, weight, columns), device=style.device)
    launch(_generate_kernel, (programs, len(style)), 8, made=made, **known, **tile)
    return made


def _backward_triton(
    g: Tensor, style: Tensor, weight: Tensor, columns: Tensor | None, rank: int, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    known = _arguments(style, weight, columns, rank, gain)
    programs, tile = _tile(weight, 1024)
    d_product = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=g.device)
    launch(
        _generate_gradient, (programs,), 4, g=g.contiguous(), d_product=d_product, d_weight=d_weight,
        images=len(style), **known, **tile,
    )  # fmt: skip
    left, right = (half.float() for half in halves(style, weight, rank))
    by_halves = gain * (d_product @ right.mT), gain * (left.mT @ d_product)
    d_style = torch.cat([half.flatten(1) for half in by_halves], 1).to(style.dtype)
    d_columns = g.new_empty(0)
    if columns is not None:
        without = _generate_triton(style, weight, None, rank, gain)
        d_columns = (g.float() * without).sum(1).to(columns.dtype)
    return d_style, d_weight.to(weight.dtype), d_columns


def _type(style: Tensor, weight: Tensor, columns: Tensor | None) -> torch.dtype:
    """Of the result, as torch promotes."""
    both = torch.promote_types(style.dtype, weight.dtype)
    return both if columns is None else torch.promote_types(both, columns.dtype)


# -- operators: Triton on CUDA, plain torch on the CPU

_generate = operator("modulated_weights", _generate_triton, _generate_aten)
_backward = operator("modulated_weights_backward", _backward_triton, _backward_aten, gradient_of="modulated_weights")


@_generate.register_fake
def _(style: Tensor, weight: Tensor, columns: Tensor | None, rank: int, gain: float) -> Tensor:
    _check(style, weight, columns, rank)
    return style.new_empty(len(style), *weight.shape, dtype=_type(style, weight, columns))


@_backward.register_fake
def _(
    g: Tensor, style: Tensor, weight: Tensor, columns: Tensor | None, rank: int, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    of_columns = g.new_empty(0) if columns is None else columns.new_empty(columns.shape)
    return style.new_empty(style.shape), weight.new_empty(weight.shape), of_columns


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.rank, ctx.gain = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    style, weight, columns = ctx.saved_tensors
    d_style, d_weight, d_columns = _backward(g, style, weight, columns, ctx.rank, ctx.gain)
    return d_style, d_weight, None if columns is None else d_columns, None, None


_generate.register_autograd(_differentiate, setup_context=_remember)


def _differentiate_backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
    """In plain torch."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
    with torch.enable_grad():
        found = _backward_aten(*leaves, ctx.rank, ctx.gain)  # type: ignore[arg-type,call-arg]
    count = 2 if leaves[3] is None else 3
    used = [t for t in leaves if t is not None]
    second = iter(torch.autograd.grad(found[:count], used, above[:count], allow_unused=True))
    return *(None if t is None else next(second) for t in leaves), None, None


_backward.register_autograd(_differentiate_backward, setup_context=_remember)
