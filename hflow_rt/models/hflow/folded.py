"""Flow chains with their constants folded (spec 6.4, points 2-4).

A step becomes one merged 1x1 map, the coupling net on only the channels it sees, and a multiply-add. Actnorm of one
step and mixing of the next are a single affine map of the channels in either direction.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.kernels.coupling import coupling_forward, coupling_inverse
from hflow_rt.layers.fold import Folds, fold_children
from hflow_rt.models.hflow.boundaries import Boundary, boundaries
from hflow_rt.models.hflow.flow import SEEN_GAIN, BetweenAffines, FlowChain, FlowResult, FlowStep, LevelFlow

__all__ = ["FOLDS", "FoldedChain", "FoldedLevelFlow"]


class ChannelMap(nn.Module):
    """`x -> W x + b` over the channels of `[B, C]` or `[B, C, H, W]`; a diagonal W is kept as a vector."""

    def __init__(self, weight: Tensor, bias: Tensor, spatial: bool) -> None:
        super().__init__()
        self.diagonal = weight.dim() == 1
        if self.diagonal and spatial:
            weight, bias = weight.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)
        elif spatial:
            weight = weight[:, :, None, None]
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.diagonal:
            return x * self.weight + self.bias
        return F.linear(x, self.weight, self.bias) if x.dim() == 2 else F.conv2d(x, self.weight, self.bias)

    def boundary(self) -> Boundary:
        """The map as the kernels take it."""
        return Boundary(self.weight.flatten() if self.diagonal else self.weight.flatten(1), self.bias.flatten())


class FoldedCoupling(nn.Module):
    """Coupling net and affine map of one step; channel splits touch only the channels they need."""

    seen: Tensor

    def __init__(self, step: FlowStep, channels: int) -> None:
        super().__init__()
        self.split = step.split
        self.region = step.region
        self.known = channels // 2 if step.split == "channels" else channels
        net: Any = copy.deepcopy(step.coupling)
        fold_children(net)
        fuse = net.fuse[0]
        fuse.weight = nn.Parameter(torch.cat([fuse.weight[:, : self.known] * SEEN_GAIN, fuse.weight[:, channels:]], 1))
        if step.split == "channels":
            for layer in (net.scale_out, net.shift_out):
                layer.weight = nn.Parameter(layer.weight[self.known :].clone())
                layer.bias = nn.Parameter(layer.bias[self.known :].clone())
        self.net = net
        self.register_buffer("seen", step.seen.clone())

    def raw(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift as the net gives them; for channel splits, of the transformed channels only."""
        if self.split == "channels":
            seen = x[:, : self.known]
        else:
            seen = x * self.seen
            if self.split in ("vhalfs", "hhalfs"):
                seen = seen.flip(3 if self.split == "vhalfs" else 2)
        log_scale, shift = self.net(seen, condition)
        return log_scale, shift

    def forward(self, x: Tensor, condition: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """`x` in either direction, with the log-determinant `[B]`."""
        couple = coupling_inverse if inverse else coupling_forward
        log_scale, shift = self.raw(x, condition)
        if self.split != "channels":
            return couple(x, log_scale, shift, 1 - self.seen)
        rest, log_det = couple(x[:, self.known :], log_scale, shift, None)
        return torch.cat([x[:, : self.known], rest], 1), log_det


class FoldedChain(nn.Module):
    """Both directions of a `FlowChain`; log-determinants of actnorm and mixing are one constant per pixel count."""

    log_det_constant: Tensor

    def __init__(self, chain: FlowChain) -> None:
        super().__init__()
        steps = [step for step in chain.steps if isinstance(step, FlowStep)]
        channels = steps[0].actnorm.shift.shape[0]
        spatial = steps[0].seen.dim() == 4
        self.couplings = nn.ModuleList(FoldedCoupling(step, channels) for step in steps)
        *before, last = (ChannelMap(weight, bias, spatial) for weight, bias, _ in boundaries(steps)[False])
        first, *after = (ChannelMap(weight, bias, spatial) for weight, bias, _ in boundaries(steps)[True])
        self.before, self.last = nn.ModuleList(before), last
        self.first, self.after = first, nn.ModuleList(reversed(after))  # by step
        pixel = torch.zeros(1, channels, dtype=torch.float64)
        per_pixel = torch.stack([step.actnorm.log_det(pixel) + step.mixing.log_det(pixel) for step in steps]).sum()
        self.register_buffer("log_det_constant", per_pixel)

    def forward(self, x: Tensor, condition: Tensor | None) -> FlowResult:
        """Latent to target."""
        log_dets = []
        for before, coupling in zip(self.before, self.couplings, strict=True):
            x, log_det = coupling(before(x), condition, False)
            log_dets.append(log_det)
        return self.result(self.last(x), log_dets, inverse=False)

    def inverse(self, x: Tensor, condition: Tensor | None) -> FlowResult:
        """Target to latent."""
        x = self.first(x)
        log_dets: list[Tensor] = []
        for after, coupling in zip(reversed(self.after), reversed(self.couplings), strict=True):
            x, log_det = coupling(x, condition, True)
            log_dets.insert(0, log_det)
            x = after(x)
        return self.result(x, log_dets, inverse=True)

    def result(self, x: Tensor, log_dets: list[Tensor], inverse: bool) -> FlowResult:
        """`x` with the log-determinants of the couplings, by step, and the constant."""
        constant = self.log_det_constant * ((1 if inverse else -1) * math.prod(x.shape[2:]))
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        return FlowResult(x, torch.stack(log_dets), constant, zero, zero)

    def stages(self) -> list[FoldedCoupling]:
        """Couplings by step."""
        return [coupling for coupling in self.couplings if isinstance(coupling, FoldedCoupling)]

    def maps(self, inverse: bool) -> list[Boundary]:
        """The channel maps around the couplings, in the order of running."""
        maps = [self.first, *reversed(self.after)] if inverse else [*self.before, self.last]
        return [channel_map.boundary() for channel_map in maps if isinstance(channel_map, ChannelMap)]

    def whole(self) -> bool:
        """There is nothing to wait for."""
        return True


class FoldedLevelFlow(FoldedChain, BetweenAffines):
    """Both directions of a `LevelFlow`."""


FOLDS: Folds = {FlowChain: FoldedChain, LevelFlow: FoldedLevelFlow}
