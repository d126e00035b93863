"""What lies beyond the border of a zero-padded convolution, as a constant map (Glow spec 2.5 and 12.2, point 4).

A kernel that sees some constant pattern outside the image and nothing of it inside adds the sum of the taps that
fall outside. This does not depend on the image.
"""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["border_map"]


def border_map(taps: Tensor, height: int, width: int) -> Tensor:
    """`[C, k, k]`, k odd, to `[C, height, width]`: at each pixel the sum of the taps outside the image."""
    side = taps.shape[-1] // 2
    outside = F.pad(taps.new_zeros(1, 1, height, width), (side, side, side, side), value=1.0)
    return F.conv2d(outside, taps[:, None])[0]
