"""Factor-2 resampling and instance norm as modules, so that export can swap each for a graph-friendly equal."""

from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.kernels.blur import blur_down, blur_up
from hflow_rt.kernels.instance_norm import instance_norm

__all__ = ["Bilinear", "BlurDown", "BlurUp", "InstanceNorm", "MeanDown"]


class BlurDown(nn.Module):
    """`[B, C, H, W]` to half the size with the (1, 3, 3, 1) kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return blur_down(x)


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
    """Zero mean and unit unbiased variance over space per sample and channel; a single pixel passes unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x) if x.shape[2] * x.shape[3] > 1 else x
