"""Per-channel affine with data-dependent initialisation (hflow spec 2.11-2.12; Kingma & Dhariwal 2018, section 3.1)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ActNorm", "data_init"]


class ActNorm(nn.Module):
    """`forward` (latent to data): `x * exp(log_scale) + shift` per channel; `inverse` undoes it.

    Works on `[B, C]` and `[B, C, H, W]`. Only the latter is initialised from data.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.initializing = False

    def forward(self, x: Tensor) -> Tensor:
        """Latent to data."""
        scale, shift = self._like(torch.exp(self.log_scale), x), self._like(self.shift, x)
        return x * scale + shift

    def inverse(self, x: Tensor) -> Tensor:
        """Data to latent."""
        if self.initializing and x.dim() == 4:
            self._initialize(x)
        return (x - self._like(self.shift, x)) * self._like(torch.exp(-self.log_scale), x)

    def log_det(self, x: Tensor) -> Tensor:
        """Log-determinant of `inverse` at the size of `x`: a scalar, in nats."""
        return -self.log_scale.sum() * math.prod(x.shape[2:])

    @staticmethod
    def _like(values: Tensor, x: Tensor) -> Tensor:
        return values.view(1, -1, *([1] * (x.dim() - 2)))

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        self.shift.copy_(x.mean(dim=(0, 2, 3)))
        self.log_scale.copy_(torch.log(x.std(dim=(0, 2, 3))))


@contextmanager
def data_init(module: nn.Module) -> Iterator[None]:
    """Within it, each spatial actnorm of `module` that `inverse` passes takes its statistics from that input."""
    layers = [layer for layer in module.modules() if isinstance(layer, ActNorm)]
    for layer in layers:
        layer.initializing = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.initializing = False
