"""Masked autoregressive flows of the posterior's samples, which keep volume (spec 4.1)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.models.nvae.convolution import NormedConv2d

__all__ = ["PosteriorFlow"]

_HIDDEN = 6  # channels inside, of each latent channel


class PosteriorFlow(nn.Module):
    """Two cells; the second sees pixels in the opposite order, channels in the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = MaskedCell(channels, mirrored=False)
        self.second = MaskedCell(channels, mirrored=True)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(z))
        return out


class MaskedCell(nn.Module):
    """`z - m(z)`, where m of a value sees only values before it: the Jacobian is triangular with ones, its log 0.

    Values are ordered by row, column and channel; mirrored: by row and column from the end.
    """

    def __init__(self, channels: int, mirrored: bool) -> None:
        super().__init__()
        index = torch.arange(channels)
        hidden_index = index.repeat_interleave(_HIDDEN)
        before, until = hidden_index[:, None] > index, index[:, None] >= hidden_index
        alone = torch.ones(_HIDDEN * channels, 1)
        hidden = _HIDDEN * channels
        self.expand = NormedConv2d(channels, hidden, 3, bias=False, mask=_mask(before, 3, mirrored))
        self.depthwise = NormedConv2d(hidden, hidden, 5, groups=hidden, bias=False, mask=_mask(alone, 5, mirrored))
        mask = _mask(until, 1, mirrored)
        self.merge = NormedConv2d(hidden, channels, 1, mask=mask, log_gain=math.log(0.1))

    def forward(self, z: Tensor) -> Tensor:
        hidden = F.elu(self.expand(z))
        hidden = F.elu(F.elu(self.depthwise(hidden)))  # twice, as the original has it
        out: Tensor = z - self.merge(hidden)
        return out


def _mask(centre: Tensor, kernel: int, mirrored: bool) -> Tensor:
    """0/1 of a kernel: 1 before its centre in raster order, `centre` `[out, in]` there, 0 behind it."""
    mask = torch.zeros(*centre.shape, kernel * kernel)
    middle = kernel * kernel // 2
    mask[:, :, :middle] = 1
    mask[:, :, middle] = centre.to(mask.dtype)
    mask = mask.reshape(*centre.shape, kernel, kernel)
    return mask.flip(2, 3) if mirrored else mask
