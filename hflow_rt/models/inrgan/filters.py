"""Filters of the augmentation: a wavelet's low-pass that doubles and halves the side, and a bank of four bands."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["band_filters", "filtered", "halved", "twice", "wavelet"]

_SYM6 = (
    0.015404109327045, 0.003490712084222, -0.117990111148520, -0.048311742585698, 0.491055941927974,
    0.787641141028651, 0.337929421728165, -0.072637522786376, -0.021060292512371, 0.044724901770781,
    0.001767711864254, -0.007800708325032,
)  # fmt: skip
_SYM6_SUM = 1.4142137  # as the original adds it, in float32
_SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)


def wavelet() -> Tensor:
    """The low-pass of sym6, `[12]` float32, of sum one."""
    return torch.tensor(_SYM6, dtype=torch.float32) / torch.tensor(_SYM6_SUM, dtype=torch.float32)


def band_filters() -> Tensor:
    """Symmetric filters `[4, 43]` float64 of four octaves, the lowest first, which sum to the identity."""
    low = np.array(_SYM2)
    high = low * (-1.0) ** np.arange(len(low))
    low2, high2 = (np.convolve(taps, taps[::-1]) / 2 for taps in (low, high))
    bank = np.eye(4, 1)
    for band in range(1, 4):
        spread = np.zeros((4, 2 * bank.shape[1] - 1))
        spread[:, ::2] = bank
        bank = np.stack([np.convolve(row, low2) for row in spread])
        start = (bank.shape[1] - len(high2)) // 2
        bank[band, start : start + len(high2)] += high2
    return torch.from_numpy(bank)


def _by_axis(x: Tensor, taps: Tensor, stride: int = 1) -> Tensor:
    """`[B, C, H, W]` with the same taps along rows, then along columns."""
    channels = x.shape[1]
    kernel = taps.expand(channels, 1, 1, -1)
    x = F.conv2d(x, kernel, stride=(1, stride), groups=channels)
    return F.conv2d(x, kernel.mT, stride=(stride, 1), groups=channels)


def twice(x: Tensor, taps: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, C, 2H, 2W]`: zeros between pixels, then the low-pass."""
    batch, channels, height, width = x.shape
    x = F.pad(x[:, :, :, None, :, None], (0, 1, 0, 0, 0, 1)).reshape(batch, channels, 2 * height, 2 * width)
    after = len(taps) // 2 - 1
    return _by_axis(F.pad(x, (after + 1, after, after + 1, after)), 2 * taps.flip(0))


def halved(x: Tensor, taps: Tensor) -> Tensor:
    """The low-pass, and every other pixel of it, without the border that it reaches over."""
    return _by_axis(x[:, :, 1:, 1:], taps, stride=2)


def filtered(x: Tensor, taps: Tensor) -> Tensor:
    """Each image of `[B, C, H, W]` with its own symmetric taps `[B, K]`, reflected at the border."""
    batch, channels, reach = *x.shape[:2], taps.shape[1] // 2
    x = F.pad(x, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    kernel = taps.repeat_interleave(channels, 0)[:, None, None, :]
    x = F.conv2d(x, kernel, groups=batch * channels)
    x = F.conv2d(x, kernel.mT, groups=batch * channels)
    return x.reshape(batch, channels, *x.shape[2:])
