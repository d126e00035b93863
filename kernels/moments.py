"""Mean and spread of every plane `[H, W]`, made from parts by Chan's formula, in the same order every time.

A sum of squares minus the squared mean cancels in float32 where the mean is large, so parts hold their own mean and
their squares about it. `instance_norm` reads the result, the blurs emit it on the way.
"""

import torch
from torch import Tensor

from hflow_rt.kernels.dispatch import jit, launch, round_up, tl

__all__ = ["EPSILON", "gather_moments", "moments_reference", "new_parts", "pooled", "statistics_dtype"]

EPSILON = 1e-6


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What sums over `x` are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def moments_reference(x: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, C, 2]`, at least float32: mean and 1 / sqrt(unbiased variance + epsilon)."""
    wide = x.to(statistics_dtype(x))
    variance, mean = torch.var_mean(wide, dim=(2, 3))
    return torch.stack([mean, torch.rsqrt(variance + EPSILON)], 2)


@jit
def pooled(count, mean, squares, axis: tl.constexpr):
    """Counts, means and squares about those means, pooled over `axis`. Empty parts count 0 and may not be NaN."""
    total = tl.sum(count, axis)
    start = tl.expand_dims(tl.max(tl.where(count > 0.0, mean, float("-inf")), axis), axis)
    start = tl.where(start > float("-inf"), start, 0.0)  # a tile beyond the last plane has no parts
    from_start = tl.expand_dims(tl.sum(count * (mean - start), axis) / tl.maximum(total, 1.0), axis)
    off = mean - start - from_start
    return total, tl.sum(start + from_start, axis), tl.sum(squares + count * off * off, axis)


@jit
def _gather(parts, moments, planes, many, EPS: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64) * PLANES + tl.arange(0, PLANES)[:, None]
    part = tl.arange(0, PARTS)[None, :]
    inside = (plane < planes) & (part < many)
    at = (plane * many + part) * 3
    count = tl.load(parts + at, inside, 0.0)
    mean = tl.load(parts + at + 1, inside, 0.0)
    squares = tl.load(parts + at + 2, inside, 0.0)
    total, mean, squares = pooled(count, mean, squares, 1)
    row = tl.program_id(0).to(tl.int64) * PLANES + tl.arange(0, PLANES)
    tl.store(moments + row * 2, mean, row < planes)
    spread = 1.0 / tl.sqrt(squares / tl.maximum(total - 1.0, 1.0) + EPS)
    tl.store(moments + row * 2 + 1, spread, row < planes)


def new_parts(x: Tensor, many: int) -> Tensor:
    """Room for the count, mean and squares of `many` parts of each plane of `x` `[B, C, ...]`."""
    return torch.empty(x.shape[0] * x.shape[1], many, 3, dtype=torch.float32, device=x.device)


def gather_moments(parts: Tensor, batch: int, channels: int) -> Tensor:
    """Parts `[B C, P, 3]` (count, mean, squares about it) to moments `[B, C, 2]`."""
    planes, many, _ = parts.shape
    moments = torch.empty(batch, channels, 2, dtype=torch.float32, device=parts.device)
    width = round_up(many)
    rows = max(1, min(round_up(planes), 512 // width))
    launch(
        _gather, (-(-planes // rows),), 4,
        parts=parts, moments=moments, planes=planes, many=many, EPS=EPSILON, PLANES=rows, PARTS=width,
    )  # fmt: skip
    return moments
