"""Factor-2 resampling and instance norm as modules, so that export can swap each for a graph-friendly equal."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.kernels.blur import blur_down, blur_down_moments, blur_up, blur_up_moments
from hflow_rt.kernels.dispatch import takes
from hflow_rt.kernels.instance_norm import EPSILON, instance_norm, instance_norm_act

__all__ = [
    "Bilinear",
    "BlurDown",
    "BlurUp",
    "FoldedBlurDown",
    "FoldedInstanceNorm",
    "InstanceNorm",
    "MeanDown",
    "norm_by_rows",
    "resample_norm",
]


class BlurDown(nn.Module):
    """`[B, C, H, W]` to half the size with the (1, 3, 3, 1) kernel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return blur_down(x)

    def fold(self) -> nn.Module:
        """The same as a depthwise convolution with stored weights."""
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
        conv = nn.Conv2d(self.channels, self.channels, 4, 2, groups=self.channels, bias=False)
        conv.weight = nn.Parameter((taps[:, None] * taps).expand(self.channels, 1, 4, 4).contiguous())
        return FoldedBlurDown(nn.ReflectionPad2d(1), conv)


class FoldedBlurDown(nn.Sequential):
    """`BlurDown` as padding and a convolution, where the kernels do not run."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to half the size."""
        if takes(x):
            return blur_down(x)
        for stage in self:
            x = stage(x)
        return x


class BlurUp(nn.Module):
    """`[B, C, H, W]` to twice the size with the (1, 3, 3, 1) kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return blur_up(x)


class MeanDown(nn.Module):
    """`[B, C, H, W]` to half the size by 2x2 means, which is bilinear (half-pixel) halving."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class Bilinear(nn.Module):
    """Bilinear resampling by `factor` (0.5 or 2) for sizes too small to blur."""

    def __init__(self, factor: float, align_corners: bool) -> None:
        super().__init__()
        self.factor, self.align_corners = factor, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [round(side * self.factor) for side in x.shape[2:]]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)


class InstanceNorm(nn.Module):
    """Zero mean and unit unbiased variance over space per sample and channel, then style where there is one.

    A single pixel passes unchanged.
    """

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, moments: Tensor | None = None
    ) -> Tensor:
        """`[B, C, H, W]` to the same. Style `[B, C, 1, 1]` comes in pairs; `moments` are for the kernels."""
        if x.shape[2] * x.shape[3] > 1:
            if takes(x):
                if scale is None or shift is None:
                    return instance_norm_act(x, moments=moments)
                return instance_norm_act(x, scale.flatten(1), shift.flatten(1), moments=moments)
            x = self.plain(x)
        return x if scale is None or shift is None else x * scale + shift

    def plain(self, x: Tensor) -> Tensor:
        """The norm where the kernels do not run."""
        return instance_norm(x)

    def fold(self) -> nn.Module:
        """The same in terms of the biased variance that inference engines normalise with."""
        return FoldedInstanceNorm()


class FoldedInstanceNorm(InstanceNorm):
    """Instance norm through the engines' own operator, whose variance is biased.

    With n pixels, a factor of sqrt((n - 1) / n) and an epsilon of (n - 1) / n times ours make up for that exactly.
    """

    def plain(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        pixels = x.shape[2] * x.shape[3]
        if pixels > LARGEST_PLAIN_SUM and torch.onnx.is_in_onnx_export():
            return norm_by_rows(x)
        ratio = (pixels - 1) / pixels
        scale = torch.full((x.shape[1],), math.sqrt(ratio), dtype=x.dtype, device=x.device)
        if torch.onnx.is_in_onnx_export():  # the exporter would spell instance_norm as a batch norm over B*C channels
            inputs = (x, scale, torch.zeros_like(scale))
            attributes: dict[str, Any] = {"epsilon": EPSILON * ratio}
            return torch.onnx.ops.symbolic(
                "InstanceNormalization", inputs, attributes, dtype=x.dtype, shape=x.shape, version=None
            )
        return F.instance_norm(x, weight=scale, eps=EPSILON * ratio)


# ONNX Runtime 1.32 adds up a whole channel in one float32 sum. Its InstanceNormalization is off by 2e-6 at 32x32 and
# 2e-5 at 128x128, and where a few pixels stand out behind a tanh an image by 3e-4. By rows it is 1e-6 at any size,
# for 0.3 ms more on 64 channels of 128x128.
LARGEST_PLAIN_SUM = 32 * 32


def norm_by_rows(x: Tensor) -> Tensor:
    """Instance norm of `[B, C, H, W]` with each mean taken over rows first, then over the row means."""
    pixels = x.shape[2] * x.shape[3]
    centred = x - x.mean(3, keepdim=True).mean(2, keepdim=True)
    variance = (centred * centred).mean(3, keepdim=True).mean(2, keepdim=True) * (pixels / (pixels - 1))
    return centred / torch.sqrt(variance + EPSILON)


def resample_norm(resample: nn.Module, norm: nn.Module, x: Tensor, *style: Tensor) -> Tensor:
    """`norm(resample(x), *style)`. Where the kernels run, a blur tells the norm the moments of what it wrote."""
    if isinstance(norm, nn.Identity) or not takes(x):
        result: Tensor = norm(resample(x), *style)
        return result
    x, moments = _with_moments(resample, x)
    result = norm(x, *style, moments=moments)
    return result


def _with_moments(resample: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`resample(x)`, and its moments if the last thing done to it was a blur."""
    if isinstance(resample, BlurUp):
        return blur_up_moments(x)
    if isinstance(resample, BlurDown | FoldedBlurDown):
        return blur_down_moments(x)
    if isinstance(resample, nn.Sequential):
        *before, last = resample
        for stage in before:
            x = stage(x)
        return _with_moments(last, x)
    return resample(x), None
