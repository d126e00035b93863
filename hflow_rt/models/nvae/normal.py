"""Normal distributions of latents: soft limits of mean and deviation, densities, divergence (spec 4)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hflow_rt.kernels.residual_normal import limited_normal

__all__ = ["Normal", "at_least_single"]


class Normal(NamedTuple):
    """Independent normal distributions, of tensors that broadcast. Densities and divergences are by element."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of_raw(cls, raw: Tensor) -> Normal:
        """Of what a sampler yields, `[B, 2 n, H, W]`: means, then logarithms of deviations, both unlimited.

        Zeros make the prior of the top group, whose deviation is 1.01.
        """
        return cls(*limited_normal(raw))

    def at(self, noise: Tensor) -> Tensor:
        """The values that standard normal `noise` stands for."""
        return self.mean + self.std * noise

    def noise(self, z: Tensor) -> Tensor:
        """The inverse of `at`."""
        return (z - self.mean) / self.std

    def log_prob(self, z: Tensor) -> Tensor:
        """Logarithm of the density, nats."""
        return -0.5 * self.noise(z).square() - 0.5 * math.log(2 * math.pi) - self.std.log()


def at_least_single(value: Tensor) -> Tensor:
    """In float32 where mixed precision made it a half type, in which squares and sums of densities are lost."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
