"""What `coupling` and `mixing` share: maps over the channels of a pixel and maps of single elements, both affine.

A lane owns pixels, not channels: it holds its pixels' numbers of every channel in registers, so that a channel map is
a row of fused multiply-adds on weights that all lanes read alike, in full float32, and no lane talks to another.
"""

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import jit, round_up, tl

__all__ = [
    "SMALL",
    "SUMMED",
    "Elementwise",
    "channel_map",
    "check_maps",
    "element_map",
    "fits",
    "flat",
    "gathered",
    "held",
    "in_registers",
    "lanes",
    "mapped",
    "outer",
    "pixels_at",
    "room",
    "steps",
]

SMALL = 16  # channels whose full map a lane can hold the numbers of; larger maps are a matrix product's work
SUMMED = 8  # those whose map's gradient a program sums: C^2 sums, which at 12 channels compile for a quarter minute


class Elementwise(NamedTuple):
    """An affine map of every element, `x * exp(log_scale) + shift` latent to image; each `[B, C, H, W]`."""

    shift: Tensor
    log_scale: Tensor


# -- plain torch


def channel_map(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`weight x + bias` over the channels of `[B, C]` or `[B, C, H, W]`; `weight` `[C, C]`, or `[C]` of a diagonal.

    In the precision of `x` even under autocast: a half-precision flow state cannot be inverted.
    """
    if weight is None:
        return x
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return channel_map(x, weight, bias)
    if weight.dim() == 2:
        if x.is_cuda and x.dim() == 4:  # a convolution would round to TF32 there unless it is switched off
            y: Tensor = torch.matmul(weight, x.flatten(2)).view(x.shape)
            return y if bias is None else y + bias.view(-1, 1, 1)
        return F.linear(x, weight, bias) if x.dim() == 2 else F.conv2d(x, weight.view(*weight.shape, 1, 1), bias)
    sides = [1] * (x.dim() - 2)
    x = x * weight.view(-1, *sides)
    return x if bias is None else x + bias.view(-1, *sides)


def element_map(x: Tensor, elementwise: Elementwise | None, inverse: bool) -> Tensor:
    """The map of every element latent to image, or where `inverse` image to latent, in the precision of `x`."""
    if elementwise is None:
        return x
    shift, log_scale = (values.to(x.dtype) for values in elementwise)
    return (x - shift) * torch.exp(-log_scale) if inverse else x * torch.exp(log_scale) + shift


# -- kernels


@jit
def pixels_at(tensor, batch, channel, pixel, step_b, step_c, step_p):
    """Where pixels of one channel are; samples in int64: a tensor may hold more than 2^31 numbers."""
    return tensor + batch.to(tl.int64) * step_b + channel * step_c + pixel * step_p


@jit
def outer(value, shift, log_scale, INVERSE: tl.constexpr):
    """`element_map`."""
    return (value - shift) * tl.exp(-log_scale) if INVERSE else value * tl.exp(log_scale) + shift


@jit
def mapped(values, weight, step, C: tl.constexpr):
    """The sum over channels of `values`, a tuple, times the weights that lie `step` apart."""
    total = values[0] * tl.load(weight)
    for c in tl.static_range(1, C):
        total += values[c] * tl.load(weight + c * step)
    return total


# -- host


def check_maps(x: Tensor, weight: Tensor | None, bias: Tensor | None, elementwise: Elementwise | None) -> None:
    """Raise ValueError where the maps do not fit `x` `[B, C, ...]`."""
    channels = x.shape[1]
    if weight is not None and tuple(weight.shape) not in ((channels,), (channels, channels)):
        raise ValueError(f"the channel map must be [{channels}, {channels}] or [{channels}], not {list(weight.shape)}")
    if bias is not None and (weight is None or tuple(bias.shape) != (channels,)):
        raise ValueError(f"the bias must be [{channels}] and come with a weight, not {list(bias.shape)}")
    for values in elementwise or ():
        if values.shape != x.shape:
            raise ValueError(f"maps of elements must be {list(x.shape)}, not {list(values.shape)}")


def fits(x: Tensor) -> bool:
    """Whether the kernels take such a state: float32 `[B, C, H, W]`, of no more pixels than a grid has programs for."""
    return x.dim() == 4 and x.dtype == torch.float32 and x.shape[2] * x.shape[3] <= 65535 * 64


def in_registers(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels apply this channel map themselves, and its gradient where there may be one."""
    few = SUMMED if torch.is_grad_enabled() else SMALL
    return weight is None or weight.dim() == 1 or x.shape[1] <= few


@overload
def flat(x: Tensor) -> Tensor: ...


@overload
def flat(x: None) -> None: ...


def flat(x: Tensor | None) -> Tensor | None:
    """`x` `[B, C, H, W]` with its pixels one step apart: itself but for crops and transposed planes, which are rare.

    And channels within 2^31 of each other, as the kernels count them.
    """
    if x is None:
        return x
    even = 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)
    return x if even and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def steps(x: Tensor | None, prefix: str) -> dict[str, int]:
    """From one sample, channel and pixel of a flat `x` to the next, as the kernels' arguments."""
    if x is None:
        return {f"{prefix}_b": 0, f"{prefix}_c": 0, f"{prefix}_p": 0}
    pixel = x.stride(3) if x.shape[3] > 1 else x.stride(2)
    return {f"{prefix}_b": x.stride(0), f"{prefix}_c": x.stride(1), f"{prefix}_p": pixel}


def held(values: Tensor | None) -> Tensor | None:
    """A channel map's weight or bias as the kernels read it."""
    return None if values is None else values.float().contiguous()


def room(like: Tensor | None, x: Tensor) -> Tensor:
    """Room for the gradient by `like`, packed; for none where there is no `like`, as an operator returns no `None`."""
    return torch.empty(0 if like is None else like.shape, dtype=(x if like is None else like).dtype, device=x.device)


def lanes(x: Tensor, full: bool, most: int, few: int) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """Grid, warps and sizes of a launch: a program owns up to `most` pixels, of all channels where their map is `full`,
    else of one. A thread loads four pixels together, or two of more than `few` channels, to have registers for them."""
    batch, channels, height, width = x.shape
    pixels, each = height * width, 2 if full and channels > few else 4
    across = min(most * each // 4, round_up(pixels))
    grid = (batch, -(-pixels // across), 1 if full else channels)
    sizes = {"pixels": pixels, "channels": channels, "FULL": full, "C": channels if full else 0, "PIXELS": across}
    return grid, max(1, across // (32 * each)), sizes


def gathered(parts: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of a channel map from the programs' parts `[P, weights + C]`, summed in a fixed order as all of
    torch's sums over a dimension."""
    if weight is None:
        return parts.new_empty(0), parts.new_empty(0)
    total = parts.sum(0)
    d_weight, d_bias = total[: weight.numel()].view(weight.shape), total[weight.numel() :]
    return d_weight.to(weight.dtype, copy=True), parts.new_empty(0) if bias is None else d_bias.to(
        bias.dtype, copy=True
    )
