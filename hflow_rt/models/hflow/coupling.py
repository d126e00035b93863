"""Coupling nets: from the seen half and the condition to raw log-scale and shift (spec 2.5 and 2.6).

Every net maps `(seen, condition)` to `(log_scale, shift)`, each of as many channels as the target. `seen` is the
masked target times sqrt(2); `fuse` is the layer that reads it, and there export folds what it can.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from hflow_rt.layers.equalized import EqualizedConv2d, EqualizedLinear
from hflow_rt.layers.masks import Split
from hflow_rt.layers.resample import Bilinear, BlurDown, BlurUp, InstanceNorm, resample_norm
from hflow_rt.models.hflow.config import LevelConfig, unet_widths

__all__ = ["CouplingCNN", "CouplingMLP", "CouplingUNet", "coupling_net"]


def coupling_net(level: LevelConfig, split: Split, condition: int) -> "CouplingCNN | CouplingUNet":
    """The net of one flow step of an image level."""
    if level.uses_unet(split):
        return CouplingUNet(level, condition)
    return CouplingCNN(level.channels, level.coupling_channels, level.coupling_kernel, condition)


class CouplingUNet(nn.Module):
    """UNet with `depth` stages that each change resolution by 2, or by 4 when `unet_double`."""

    def __init__(self, level: LevelConfig, condition: int) -> None:
        super().__init__()
        widths = unet_widths(level.coupling_channels, level.unet_growth, level.unet_depth)
        kernel = level.coupling_kernel
        stage = 1 if level.unet_pointwise else kernel
        base, lowest = widths[0], level.resolution // 2**level.unet_depth

        def leaky(c_in: int, c_out: int, k: int) -> EqualizedConv2d:
            return EqualizedConv2d(c_in, c_out, k, activation="leaky")

        self.condition = EqualizedConv2d(condition, condition // 2, activation="tanh")
        self.fuse = leaky(level.channels + condition // 2, base, 3)
        self.conv1, self.conv2, self.conv3 = (leaky(base, base, kernel) for _ in range(3))
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(leaky(a, b, stage) for a, b in pairs)
        self.down_b = nn.ModuleList(leaky(b, b, stage) for _, b in pairs)
        self.down_merge = nn.ModuleList(EqualizedConv2d(a + b, b, stage) for a, b in pairs)
        self.bottom = leaky(widths[-1], widths[-1], 3 if lowest > 1 else 1)
        pairs.reverse()
        self.up = nn.ModuleList(leaky(b, b, stage) for _, b in pairs)
        self.up_b = nn.ModuleList(leaky(b, a, stage) for a, b in pairs)
        self.up_merge = nn.ModuleList(EqualizedConv2d(a + b, a, stage) for a, b in pairs)
        half = base // 2
        self.scale_head, self.shift_head = leaky(half, half, 3), leaky(half, half, 3)
        self.scale_out = EqualizedConv2d(half, level.channels, zero=True)
        self.shift_out = EqualizedConv2d(half, level.channels, zero=True)
        self.shrink, self.grow = _resamplers(level.resolution, widths[:-1], level.unet_double)
        self.norm = InstanceNorm()

    def forward(self, seen: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Seen half `[B, C, R, R]` and condition `[B, Cc, R, R]` to raw log-scale and shift `[B, C, R, R]`."""
        h = self.fuse(torch.cat([seen, self.condition(condition)], 1))
        h = self.conv2(self.conv1(h))
        skips: list[Tensor] = []
        for i, shrink in enumerate(self.shrink):
            skips.append(h)
            h = resample_norm(shrink, self.norm, h)
            h = self.down_merge[i](torch.cat([h, self.down_b[i](self.down[i](h))], 1))
        h = self.bottom(h)
        for i, grow in enumerate(self.grow):
            h = resample_norm(grow, self.norm, h)
            h = self.up_merge[i](torch.cat([h, self.up_b[i](self.up[i](h))], 1))
            h = (h + skips.pop()) / math.sqrt(2)
        h_scale, h_shift = self.conv3(h).chunk(2, 1)
        return self.scale_out(self.scale_head(h_scale)), self.shift_out(self.shift_head(h_shift))


def _resamplers(resolution: int, widths: list[int], double: bool) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The way down and the way up again: blur where the size is above 4, else corner-aligned bilinear."""
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    size = resolution
    for width in widths:
        shrink: list[nn.Module] = []
        grow: list[nn.Module] = []
        for _ in range(2 if double else 1):
            shrink.append(BlurDown(width) if size > 4 else Bilinear(0.5, align_corners=True))
            size = math.ceil(size / 2)
            grow.insert(0, BlurUp() if size > 4 else Bilinear(2, align_corners=True))
        down.append(nn.Sequential(*shrink))
        up.insert(0, nn.Sequential(*grow))
    return nn.ModuleList(down), nn.ModuleList(up)


class CouplingCNN(nn.Module):
    """Plain CNN with a tanh bottleneck to as many channels as the target, then instance norm."""

    def __init__(self, channels: int, width: int, kernel: int, condition: int) -> None:
        super().__init__()
        self.condition = EqualizedConv2d(condition, condition, 3, activation="leaky")
        self.fuse = EqualizedConv2d(channels + condition, channels, 3, activation="tanh")
        self.norm = InstanceNorm()
        self.conv1 = EqualizedConv2d(channels, width, kernel, activation="leaky")
        self.conv2 = EqualizedConv2d(width, width, kernel, activation="leaky")
        self.conv3 = EqualizedConv2d(width, width, kernel, activation="leaky")
        self.scale_out = EqualizedConv2d(width // 2, channels, zero=True)
        self.shift_head = EqualizedConv2d(width // 2, width // 2, 3, activation="leaky")
        self.shift_out = EqualizedConv2d(width // 2, channels)

    def forward(self, seen: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Seen half `[B, C, R, R]` and condition `[B, Cc, R, R]` to raw log-scale and shift `[B, C, R, R]`."""
        condition = condition + self.condition(condition)
        h = self.norm(self.fuse(torch.cat([seen, condition], 1)))
        h_scale, h_shift = self.conv3(self.conv2(self.conv1(h))).chunk(2, 1)
        return self.scale_out(h_scale), self.shift_out(self.shift_head(h_shift))


class CouplingMLP(nn.Module):
    """The same shape on vectors `[B, C]` for the end block; no norm; the first part has no condition."""

    def __init__(self, channels: int, width: int, condition: int | None) -> None:
        super().__init__()
        self.condition = EqualizedLinear(condition, condition, activation="leaky") if condition else None
        first = "leaky" if condition else "tanh"
        self.fuse = EqualizedLinear(channels + (condition or 0), channels, activation=first)  # type: ignore[arg-type]
        self.conv1 = EqualizedLinear(channels, width, activation="leaky")
        self.conv2 = EqualizedLinear(width, width, activation="leaky")
        self.conv3 = EqualizedLinear(width, width, activation="leaky")
        self.scale_out = EqualizedLinear(width // 2, channels, zero=True)
        self.shift_head = EqualizedLinear(width // 2, width // 2, activation="leaky")
        self.shift_out = EqualizedLinear(width // 2, channels)

    def forward(self, seen: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Seen half `[B, C]` and condition `[B, Cc]` to raw log-scale and shift `[B, C]`."""
        if self.condition is not None and condition is not None:
            seen = torch.cat([seen, condition + self.condition(condition)], 1)
        h = self.conv3(self.conv2(self.conv1(self.fuse(seen))))
        h_scale, h_shift = h.chunk(2, 1)
        return self.scale_out(h_scale), self.shift_out(self.shift_head(h_shift))
