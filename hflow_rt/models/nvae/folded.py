"""The same network for inference, with every constant folded in float64 (spec 11)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.models.family import Gain
from hflow_rt.models.nvae.cells import SHIFTS, DownSkip, InvertedResidual
from hflow_rt.models.nvae.convolution import NormedConv2d
from hflow_rt.models.nvae.network import Network

__all__ = ["folded", "gains"]

N = TypeVar("N", bound=Network)


class _Affine(nn.Module):
    """Batch norm with its running statistics, of which only the swish is asked."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = _line(norm)
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def swish(self, x: Tensor) -> Tensor:
        return F.silu(x * self.scale + self.shift)


class _DownSkip(nn.Module):
    """One 2x2 convolution, of which every quarter of the outputs has one tap."""

    def __init__(self, skip: DownSkip) -> None:
        super().__init__()
        weights, biases = [], []
        for conv, (dy, dx) in zip(skip.convs, SHIFTS, strict=True):
            assert isinstance(conv, NormedConv2d)
            assert conv.bias is not None
            weights.append(F.pad(conv.effective_weight(), (dx, 1 - dx, dy, 1 - dy)))
            biases.append(conv.bias)
        self.conv = _conv(torch.cat(weights), torch.cat(biases), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.conv(F.silu(x))
        return convolved


class _InvertedResidual(nn.Module):
    """Without norms; pixels are doubled after the first convolution, which sees one pixel alone."""

    def __init__(self, body: InvertedResidual) -> None:
        super().__init__()
        self.up = body.up
        scale_in, shift_in = _line(body.norm_in)
        expand = body.expand.weight * scale_in[:, None, None]
        shift = (body.expand.weight[:, :, 0, 0] * shift_in).sum(1)
        self.expand = _conv(*_behind(body.norm_expanded, expand, shift))
        depthwise = body.depthwise
        self.depthwise = _conv(
            *_behind(body.norm_depthwise, depthwise.weight), padding=depthwise.padding[0], groups=depthwise.groups
        )
        self.project = _conv(*_behind(body.norm_out, body.project.weight))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.expand(x))
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        out: Tensor = self.project(F.silu(self.depthwise(x)))
        return out


def folded(network: N) -> N:
    """A float32 copy in eval mode that computes the same, of the network in eval mode."""
    clone = copy.deepcopy(network).double().eval().requires_grad_(False)
    _fold(clone)
    return clone.float()


def gains(network: Network) -> Iterator[Gain]:
    """What folding multiplies the weights of each convolution by, of the network in eval mode."""
    for module in network.modules():
        match module:
            case NormedConv2d():
                yield _numbers(module.gain())
            case DownSkip():
                yield _numbers(torch.cat([conv.gain() for conv in module.convs if isinstance(conv, NormedConv2d)]))
            case InvertedResidual():
                before, expanded, depthwise, out = (
                    _numbers(_line(norm)[0])
                    for norm in (module.norm_in, module.norm_expanded, module.norm_depthwise, module.norm_out)
                )
                yield from ((expanded, before), depthwise, out)


def _numbers(values: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values.detach().cpu().numpy()
    return found


def _fold(module: nn.Module) -> None:
    for name, child in module.named_children():
        match child:
            case NormedConv2d():
                weight, bias = child.effective_weight(), child.bias
                padding = child.padding[0]
                assert isinstance(padding, int)
                made: nn.Module = _conv(weight, bias, child.stride[0], padding, child.groups)
            case DownSkip():
                made = _DownSkip(child)
            case InvertedResidual():
                made = _InvertedResidual(child)
            case nn.BatchNorm2d():
                made = _Affine(child)
            case _:
                _fold(child)
                continue
        setattr(module, name, made)


def _line(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift, float64 `[C]`, of a batch norm with its running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _behind(norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that has this norm behind it."""
    scale, shift = _line(norm)
    return weight * scale[:, None, None, None], shift + scale * bias


def _conv(weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int | str = 0, groups: int = 1) -> nn.Conv2d:
    outputs, inputs, height, width = weight.shape
    has_bias = bias is not None
    with torch.device("meta"):  # made without values, which come next
        made = nn.Conv2d(inputs * groups, outputs, (height, width), stride, padding, groups=groups, bias=has_bias)
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made
