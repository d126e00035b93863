"""Normal distributions of latents: soft limits of mean and deviation, densities, divergence (spec 4)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Normal", "at_least_single"]

_LIMIT = 5.0
_SMALLEST_STD = 0.01


class Normal(NamedTuple):
    """Independent normal distributions, of tensors that broadcast. Densities and divergences are by element."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of_raw(cls, raw: Tensor) -> Normal:
        """Of what a sampler yields, `[B, 2 n, H, W]`: means, then logarithms of deviations, both unlimited.

        Zeros make the prior of the top group, whose deviation is 1.01.
        """
        mean, log_std = at_least_single(raw).chunk(2, 1)
        return cls(_limited(mean), _limited(log_std).exp() + _SMALLEST_STD)

    def at(self, noise: Tensor) -> Tensor:
        """The values that standard normal `noise` stands for."""
        return self.mean + self.std * noise

    def noise(self, z: Tensor) -> Tensor:
        """The inverse of `at`."""
        return (z - self.mean) / self.std

    def log_prob(self, z: Tensor) -> Tensor:
        """Logarithm of the density, nats."""
        return -0.5 * self.noise(z).square() - 0.5 * math.log(2 * math.pi) - self.std.log()

    def divergence(self, other: Normal) -> Tensor:
        """KL(self || other), nats."""
        ratio = self.std / other.std
        apart = (self.mean - other.mean) / other.std
        return 0.5 * (apart.square() + ratio.square()) - 0.5 - ratio.log()


def at_least_single(value: Tensor) -> Tensor:
    """In float32 where mixed precision made it a half type, in which squares and sums of densities are lost."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _limited(value: Tensor) -> Tensor:
    """To (-5, 5), smoothly."""
    return _LIMIT * torch.tanh(value / _LIMIT)
