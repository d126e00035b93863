"""Where 8-bit levels stand in a flow's range [-0.5, 0.5), for data of any number of bits.

With n = 2^bits bins, level k is the interval [k / n, (k + 1) / n) - 0.5. Publicly it is k / (n - 1) in [0, 1], which
goes to the centre of its bin and back. So rounding a decoded image to public levels is the same as taking the bin
(the floor) in the flow's range, and a round trip with errors below half a bin returns every level exactly.
"""

import torch
from torch import Tensor

__all__ = ["in_bins", "public_levels", "to_model", "to_public"]


def in_bins(pixels: Tensor, bits: int, uniform: Tensor | float = 0.5) -> Tensor:
    """uint8 images to the flow's range, at the place `uniform` in [0, 1) of each bin; float32 or as `uniform`.

    Fewer than 8 bits drop the lowest.
    """
    bins = 1 << bits
    levels = (pixels // (256 // bins)).to(uniform.dtype if isinstance(uniform, Tensor) else torch.float32)
    return (levels + uniform) / bins - 0.5


def public_levels(pixels: Tensor, bits: int) -> Tensor:
    """uint8 images to public [0, 1] at the levels that `bits` leave, float32."""
    bins = 1 << bits
    return (pixels // (256 // bins)).to(torch.float32) / (bins - 1)


def to_model(images: Tensor, bits: int) -> Tensor:
    """Public [0, 1] to the flow's range, each level to the centre of its bin."""
    bins = 1 << bits
    return images * ((bins - 1) / bins) + (0.5 / bins - 0.5)


def to_public(x: Tensor, bits: int) -> Tensor:
    """The inverse of `to_model`, clamped to [0, 1]."""
    bins = 1 << bits
    return ((x + (0.5 - 0.5 / bins)) * (bins / (bins - 1))).clamp(0, 1)
