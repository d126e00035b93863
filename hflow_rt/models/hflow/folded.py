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
from hflow_rt.layers.fold import fold_children
from hflow_rt.models.hflow.flow import SEEN_GAIN, BetweenAffines, FlowChain, FlowResult, FlowStep

__all__ = ["FoldedChain", "FoldedLevelFlow"]


class ChannelMap(nn.Module):
    """`x -> W x + b` over the channels of `[B, C]` or `[B, C, H, W]`; a diagonal W is kept as a vector."""

    def __init__(self, weight: Tensor, bias: Tensor | None, spatial: bool) -> None:
        super().__init__()
        self.diagonal = weight.dim() == 1
        if self.diagonal and spatial:
            weight, bias = weight.view(1, -1, 1, 1), None if bias is None else bias.view(1, -1, 1, 1)
        elif spatial:
            weight = weight[:, :, None, None]
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.diagonal:
            x = x * self.weight
            return x if self.bias is None else x + self.bias
        return F.linear(x, self.weight, self.bias) if x.dim() == 2 else F.conv2d(x, self.weight, self.bias)


class FoldedCoupling(nn.Module):
    """Coupling net and affine map of one step; channel splits touch only the channels they need."""

    seen: Tensor

    def __init__(self, step: FlowStep, channels: int) -> None:
        super().__init__()
        self.split = step.split
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

    def forward(self, x: Tensor, condition: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """`x` in either direction, with the log-determinant `[B]`."""
        couple = coupling_inverse if inverse else coupling_forward
        log_scale: Tensor
        shift: Tensor
        if self.split == "channels":
            known, rest = x[:, : self.known], x[:, self.known :]
            log_scale, shift = self.net(known, condition)
            rest, log_det = couple(rest, log_scale, shift, None)
            return torch.cat([known, rest], 1), log_det
        seen = x * self.seen
        if self.split in ("vhalfs", "hhalfs"):
            seen = seen.flip(3 if self.split == "vhalfs" else 2)
        log_scale, shift = self.net(seen, condition)
        return couple(x, log_scale, shift, 1 - self.seen)


class FoldedChain(nn.Module):
    """Both directions of a `FlowChain`; log-determinants of actnorm and mixing are one constant per pixel count."""

    log_det_constant: Tensor

    def __init__(self, chain: FlowChain) -> None:
        super().__init__()
        steps = [step for step in chain.steps if isinstance(step, FlowStep)]
        channels = steps[0].actnorm.shift.shape[0]
        spatial = steps[0].seen.dim() == 4
        self.couplings = nn.ModuleList(FoldedCoupling(step, channels) for step in steps)
        self.before, self.after = nn.ModuleList(), nn.ModuleList()
        scale, shift = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
        for step in steps:
            # `scale` and `shift` are the previous step's actnorm, latent to target
            matrix, undone = step.mixing.matrices()
            self.before.append(ChannelMap(undone * scale, undone @ shift, spatial))
            self.after.append(ChannelMap(matrix / scale[:, None], -shift / scale, spatial))
            scale, shift = step.actnorm.log_scale.exp(), step.actnorm.shift
        self.last = ChannelMap(scale, shift, spatial)
        self.first = ChannelMap(1 / scale, -shift / scale, spatial)
        pixel = torch.zeros(1, channels, dtype=torch.float64)
        per_pixel = torch.stack([step.actnorm.log_det(pixel) + step.mixing.log_det(pixel) for step in steps]).sum()
        self.register_buffer("log_det_constant", per_pixel)

    def forward(self, x: Tensor, condition: Tensor | None) -> FlowResult:
        """Latent to target."""
        log_dets = []
        for before, coupling in zip(self.before, self.couplings, strict=True):
            x, log_det = coupling(before(x), condition, False)
            log_dets.append(log_det)
        return self._result(self.last(x), log_dets, -1)

    def inverse(self, x: Tensor, condition: Tensor | None) -> FlowResult:
        """Target to latent."""
        x = self.first(x)
        log_dets: list[Tensor] = []
        for after, coupling in zip(reversed(self.after), reversed(self.couplings), strict=True):
            x, log_det = coupling(x, condition, True)
            log_dets.insert(0, log_det)
            x = after(x)
        return self._result(x, log_dets, 1)

    def _result(self, x: Tensor, log_dets: list[Tensor], sign: int) -> FlowResult:
        constant = self.log_det_constant * (sign * math.prod(x.shape[2:]))
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        return FlowResult(x, torch.stack(log_dets), constant, zero, zero)


class FoldedLevelFlow(BetweenAffines, FoldedChain):
    """Both directions of a `LevelFlow`."""
