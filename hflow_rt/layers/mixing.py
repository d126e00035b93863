"""Invertible channel mixing at every pixel, the learned permutation of a flow step (hflow spec 2.2).

Every matrix that is inverted or exponentiated is computed in float64 and rounded once: a float32 exponential of
a 508-wide skew matrix is orthogonal only to 1e-4, which makes image inversion 100 times worse.
"""

import math

import torch
from torch import Tensor, nn

from hflow_rt.kernels.mixing import mixing

__all__ = ["FreeMixing", "UnitaryMixing", "channel_map"]


def channel_map(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the channels of `[B, C]` or `[B, C, H, W]` by `matrix` `[C, C]`, in the precision of `x` even under
    autocast."""
    return mixing(x, matrix)


class FreeMixing(nn.Module):
    """`A = scale * K`, starting orthogonal. `inverse` (data to latent) multiplies by A, `forward` by its inverse."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        orthogonal: Tensor = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        self.weight = nn.Parameter((orthogonal / scale).float())

    @staticmethod
    def pair(weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """A and its inverse in float64, of one weight `[C, C]` or of a stack `[..., C, C]`."""
        matrix = weight.double() * scale
        # looking whether it is singular would wait for the device; there the determinant tells
        return matrix, torch.linalg.inv_ex(matrix, check_errors=not matrix.is_cuda)[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and its inverse in float64."""
        return self.pair(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Latent to data, `[B, C]` or `[B, C, H, W]`."""
        return channel_map(x, torch.linalg.inv(self.weight.double() * self.scale).to(x.dtype))

    def inverse(self, x: Tensor) -> Tensor:
        """Data to latent."""
        return channel_map(x, self.weight * self.scale)

    def log_det(self, x: Tensor) -> Tensor:
        """Log-determinant of `inverse` at the size of `x`: a scalar, in nats."""
        log_abs: Tensor = torch.linalg.slogdet(self.weight.double() * self.scale)[1]
        return (log_abs * math.prod(x.shape[2:])).to(x.dtype)


class UnitaryMixing(nn.Module):
    """`U = exp((V - V^T) scale)`, orthogonal by construction: log-determinant exactly 0, inverse is the transpose."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(channels, channels) / scale)

    @staticmethod
    def pair(weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """U and its transpose in float64, of one weight `[C, C]` or of a stack `[..., C, C]`."""
        wide = weight.double()
        matrix = torch.linalg.matrix_exp((wide - wide.mT) * scale)
        return matrix, matrix.mT

    def matrices(self) -> tuple[Tensor, Tensor]:
        """U and its transpose in float64."""
        return self.pair(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Latent to data, `[B, C]` or `[B, C, H, W]`."""
        return channel_map(x, self.matrices()[1].to(x.dtype))

    def inverse(self, x: Tensor) -> Tensor:
        """Data to latent."""
        return channel_map(x, self.matrices()[0].to(x.dtype))

    def log_det(self, x: Tensor) -> Tensor:
        """Exactly 0."""
        return x.new_zeros(())
