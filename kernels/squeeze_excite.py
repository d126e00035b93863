"""A residual branch, scaled by what the means of its channels say, added to what skips it (nvae spec 2, 12 F).

    out = skip + factor * gate(mean(y)) * y        gate(m) = sigmoid(expand(relu(reduce(m))))

Two passes read `y`, one reads `skip` and writes. The gate's two small matrix products are torch's, in float32. For the
gradient the inputs and the gate are kept; its sums are made in two stages in a fixed order.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import jit, launch, operator, takes, tl
from hflow_rt.kernels.group_norm import _tile
from hflow_rt.kernels.moments import statistics_dtype

__all__ = ["squeeze_excite", "squeeze_excite_reference"]


def squeeze_excite(
    skip: Tensor, y: Tensor, reduce: tuple[Tensor, Tensor], expand: tuple[Tensor, Tensor], factor: float
) -> Tensor:
    """`skip + factor * gate * y`, both `[B, C, H, W]`, in the wider of their types.

    reduce, expand: weights `[D, C]` and `[C, D]` of the gate's layers, with biases.
    """
    if takes(y):
        made: Tensor = _excite(skip, y, *reduce, *expand, factor)[0]
        return made
    return squeeze_excite_reference(skip, y, *reduce, *expand, factor)


# -- plain torch


def squeeze_excite_reference(
    skip: Tensor, y: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor, factor: float
) -> Tensor:
    """`squeeze_excite` in plain torch, differentiable any number of times."""
    w_1, b_1, w_2, b_2 = (w.to(y.dtype) for w in (w_reduce, b_reduce, w_expand, b_expand))
    gate = torch.sigmoid(F.linear(F.relu(F.linear(y.mean((2, 3)), w_1, b_1)), w_2, b_2))
    return skip + factor * (y * gate[:, :, None, None])


def gate_of(means: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor) -> Tensor:
    """`[B, C]` of means `[B, C]`, in the type of the means whatever autocast says."""
    weights = [w.to(means.dtype) for w in (w_reduce, b_reduce, w_expand, b_expand)]
    with _exactly(means):
        return torch.sigmoid(F.linear(F.relu(F.linear(means, *weights[:2])), *weights[2:]))


def _exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast leaves matrix products in the type of `x`."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _excite_aten(
    skip: Tensor, y: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = y.to(statistics_dtype(y))
    means = wide.mean((2, 3))
    gate = gate_of(means, w_reduce, b_reduce, w_expand, b_expand)
    made = skip.to(wide) + factor * gate[:, :, None, None] * wide
    return made.to(torch.promote_types(skip.dtype, y.dtype)).contiguous(), means, gate


# -- kernels: a tile is some planes whole, or a part of one


@jit
def _plane_sums(x, other, parts, planes, pixels, PLANES: tl.constexpr, PIXELS: tl.constexpr):
    """Sums of parts of planes, or of their products with another's."""
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (plane < planes) & (pixel < pixels)
    at = plane.to(tl.int64) * pixels + pixel
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if other is not None:
        value *= tl.load(other + at, inside, 0.0).to(tl.float32)
    out = parts + plane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out, tl.expand_dims(tl.sum(value, 1), 1), plane < planes)


@jit
def _gated(x, gate, skip, rest, out, planes, pixels, FACTOR: tl.constexpr, PLANES: tl.constexpr, PIXELS: tl.constexpr):
    """Planes times their gates and a factor, plus another tensor's or a number each."""
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[None, :]
    real = plane < planes
    inside = real & (pixel < pixels)
    at = plane.to(tl.int64) * pixels + pixel
    value = tl.load(x + at, inside, 0.0).to(tl.float32) * (FACTOR * tl.load(gate + plane, real, 0.0))
    if skip is not None:
        value += tl.load(skip + at, inside, 0.0).to(tl.float32)
    else:
        value += tl.load(rest + plane, real, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


# -- host


def _check(skip: Tensor, y: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor) -> None:
    if y.dim() != 4 or skip.shape != y.shape:
        raise ValueError(f"skip and branch must be [B, C, H, W], not {list(skip.shape)} and {list(y.shape)}")
    channels, hidden = y.shape[1], len(b_reduce)
    wanted = [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    found = [tuple(w.shape) for w in (w_reduce, b_reduce, w_expand, b_expand)]
    if found != wanted:
        raise ValueError(f"the gate's layers must be {wanted}, not {found}")


def _sums(x: Tensor, other: Tensor | None) -> Tensor:
    """Of every plane, `[B, C]`."""
    planes, pixels = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    grid, side, across, warps = _tile(planes, pixels)
    parts = torch.empty(planes, grid[1], dtype=torch.float32, device=x.device)
    launch(
        _plane_sums, grid, warps, x=x.contiguous(), other=None if other is None else other.contiguous(), parts=parts,
        planes=planes, pixels=pixels, PLANES=side, PIXELS=across,
    )  # fmt: skip
    return parts.sum(1).view(x.shape[:2])


def _scaled(
    x: Tensor, gate: Tensor, dtype: torch.dtype, factor: float, skip: Tensor | None, rest: Tensor | None
) -> Tensor:
    planes, pixels = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    grid, side, across, warps = _tile(planes, pixels)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch(
        _gated, grid, warps, x=x.contiguous(), gate=gate.contiguous(), skip=None if skip is None else skip.contiguous(),
        rest=None if rest is None else rest.contiguous(), out=out, planes=planes, pixels=pixels,
        FACTOR=factor, PLANES=side, PIXELS=across,
    )  # fmt: skip
    return out


def _excite_triton(
    skip: Tensor, y: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(skip, y, w_reduce, b_reduce, w_expand, b_expand)
    means = _sums(y, None) / (y.shape[2] * y.shape[3])
    gate = gate_of(means, w_reduce, b_reduce, w_expand, b_expand)
    return _scaled(y, gate, torch.promote_types(skip.dtype, y.dtype), factor, skip, None), means, gate


def _backward_triton(
    g: Tensor, y: Tensor, means: Tensor, gate: Tensor,
    w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    by_gate = factor * _sums(g, y)
    by_means, w_1, b_1, w_2, b_2 = _through_gate(by_gate, means, gate, w_reduce, b_reduce, w_expand)
    rest = by_means / (y.shape[2] * y.shape[3])
    return _scaled(g, gate, y.dtype, factor, None, rest), w_1, b_1, w_2, b_2


def _backward_aten(
    g: Tensor, y: Tensor, means: Tensor, gate: Tensor,
    w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = gate.dtype
    by_gate = factor * (g.to(wide) * y.to(wide)).sum((2, 3))
    by_means, w_1, b_1, w_2, b_2 = _through_gate(by_gate, means, gate, w_reduce, b_reduce, w_expand)
    rest = (by_means / (y.shape[2] * y.shape[3]))[:, :, None, None]
    d_y = g.to(wide) * (factor * gate[:, :, None, None]) + rest
    return d_y.to(y.dtype).contiguous(), w_1, b_1, w_2, b_2


def _through_gate(
    by_gate: Tensor, means: Tensor, gate: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the means and by weights and biases of both layers, of that by the gate."""
    w_1, b_1, w_2 = (w.to(means.dtype) for w in (w_reduce, b_reduce, w_expand))
    with _exactly(means):
        hidden = F.relu(F.linear(means, w_1, b_1))
        by_out = by_gate * gate * (1 - gate)
        by_hidden = (by_out @ w_2) * (hidden > 0)
        return by_hidden @ w_1, by_hidden.T @ means, by_hidden.sum(0), by_out.T @ hidden, by_out.sum(0)


# -- operators: Triton on CUDA, plain torch on the CPU

_excite = operator("squeeze_excite", _excite_triton, _excite_aten)
_backward = operator("squeeze_excite_backward", _backward_triton, _backward_aten, gradient_of="squeeze_excite")


@_excite.register_fake
def _(
    skip: Tensor, y: Tensor, w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(skip, y, w_reduce, b_reduce, w_expand, b_expand)
    small = [y.new_empty(y.shape[:2], dtype=statistics_dtype(y)) for _ in range(2)]
    return y.new_empty(y.shape, dtype=torch.promote_types(skip.dtype, y.dtype)), small[0], small[1]


@_backward.register_fake
def _(
    g: Tensor, y: Tensor, means: Tensor, gate: Tensor,
    w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = (w_reduce.shape, b_reduce.shape, w_expand.shape, y.shape[1:2])
    by_layers = [gate.new_empty(shape) for shape in shapes]
    return y.new_empty(y.shape), by_layers[0], by_layers[1], by_layers[2], by_layers[3]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    skip, y, w_reduce, b_reduce, w_expand, _, ctx.factor = inputs
    ctx.kind = skip.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(y, *output[1:], w_reduce, b_reduce, w_expand)


def _differentiate(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    y, means, gate, *layers = ctx.saved_tensors
    d_y, *by_layers = _backward(g, y, means, gate, *layers, ctx.factor)
    kinds = [*(layer.dtype for layer in layers), layers[0].dtype]
    by_layers = [d.to(kind) for d, kind in zip(by_layers, kinds, strict=True)]
    return g.to(ctx.kind), d_y, *by_layers, None


_excite.register_autograd(_differentiate, setup_context=_remember)
