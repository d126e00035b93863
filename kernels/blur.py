"""2x resampling with the binomial kernel (1, 3, 3, 1) / 8 per axis (hflow spec 2.6)."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["blur_down", "blur_up"]


def blur_down(x: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, C, H/2, W/2]`: out[m] = (x[2m-1] + 3 x[2m] + 3 x[2m+1] + x[2m+2]) / 8, reflected ends."""
    channels = x.shape[1]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    weight = (taps[:, None] * taps[None, :]).expand(channels, 1, 4, 4)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, stride=2, groups=channels)


def blur_up(x: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, C, 2H, 2W]`: out[2m] = (x[m-1] + 3 x[m]) / 4, out[2m+1] = (3 x[m] + x[m+1]) / 4.

    The first sample is repeated before the start and the last but one reflected past the end. That is half-pixel
    bilinear interpolation but for the last row and column, hence one reflected row and column and a crop.
    """
    padded = F.pad(x, (0, 1, 0, 1), mode="reflect")
    return F.interpolate(padded, scale_factor=2, mode="bilinear", align_corners=False)[..., :-2, :-2]
