"""Layers of INR-GAN: coordinate embeddings, and 1x1 maps whose weights a w modulates (spec section 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.kernels.bias_act import GAIN, SLOPE, bias_act
from hflow_rt.kernels.modulated_weights import modulated_weights
from hflow_rt.layers.equalized import EqualizedLinear
from hflow_rt.models.inrgan.config import EmbeddingConfig, octaves
from hflow_rt.models.inrgan.view import Pixels

__all__ = [
    "LR_SCALE",
    "CoordinateEmbedding",
    "ModulatedLayer",
    "ToColours",
    "by_pixel",
    "grid",
    "normalized",
    "phi",
    "spread",
]

_EPS = 1e-8
_RANDOM_STD = math.sqrt(10)
LR_SCALE = 0.01  # of mappings


def phi(x: Tensor) -> Tensor:
    """The activation."""
    return GAIN * F.leaky_relu(x, SLOPE)


def normalized(x: Tensor) -> Tensor:
    """Rows `[B, D]` of mean square one."""
    return x * (x.square().mean(1, keepdim=True) + _EPS).rsqrt()


def spread(x: Tensor) -> Tensor:
    """Unbiased standard deviation `[B, C, 1, 1]` over the pixels, and a little more. x: `[B, C, H, W]`.

    Written out, for `Tensor.std` takes more than twice as long on a CPU.
    """
    off: Tensor = torch.linalg.vector_norm(x - x.mean((2, 3), keepdim=True), dim=(2, 3), keepdim=True)
    return off / math.sqrt(x.shape[2] * x.shape[3] - 1) + _EPS


def by_pixel(weights: Tensor, x: Tensor) -> Tensor:
    """`[B, C_out, C_in]` times every pixel of `[B, C_in, H, W]`."""
    y = weights @ x.flatten(2)
    return y.reshape(*y.shape[:2], *x.shape[2:])


def grid(side: int) -> Tensor:
    """Coordinates x, y of pixels, `[2, side, side]` float64 in [-1, 1): y is -1 in the bottom row."""
    line = torch.arange(side, dtype=torch.float64)
    return coordinates(line, line, side)


def coordinates(x: Tensor, y: Tensor, side: int) -> Tensor:
    """`[2, N, N]` of the pixels at x, y `[N]` in pixels of a grid of `side`, from the top left."""
    x, y = 2 * x / side - 1, 2 * (side - 1 - y) / side - 1
    return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))])


def octave_waves(side: int, diagonal: bool) -> Tensor:
    """Phases a unit of x and y, `[rows, 2]`: the octaves of one direction, then those of the next."""
    directions = [(0.0, 0.5), (0.5, 0.0)] + ([(-0.25, 0.25), (0.25, 0.25)] if diagonal else [])
    rows = [(math.pi * x * 2**m, math.pi * y * 2**m) for x, y in directions for m in range(octaves(side))]
    return torch.tensor(rows)


class CoordinateEmbedding(nn.Module):
    """Sines, cosines and the learned map, `[1, E, n, n]`: it depends on no input.

    `waves` is a buffer because the random ones are drawn once, and belong to the weights.
    """

    waves: Tensor

    def __init__(self, config: EmbeddingConfig, side: int) -> None:
        super().__init__()
        self.side, self.cosine = side, config.cosine
        drawn = _RANDOM_STD * torch.randn(config.random, 2)
        self.register_buffer("waves", torch.cat([octave_waves(side, config.diagonal).to(drawn), drawn]))
        self.const = nn.Parameter(torch.randn(1, config.const, side, side))

    def forward(self, pixels: Pixels | None = None) -> Tensor:
        """The embedding, in the type of `const`, on the grid or at the pixels of a view."""
        places = grid(self.side) if pixels is None else coordinates(pixels.x, pixels.y, self.side)
        phase = torch.einsum("kc,cij->kij", self.waves, places.to(self.waves))[None]
        waves = [phase.sin(), phase.cos()] if self.cosine else [phase.sin()]
        const = self.const if pixels is None else pixels.reader(self.side).to(self.const.device)(self.const)
        return torch.cat([*waves, const], 1)


class ModulatedLayer(nn.Module):
    """A 1x1 map whose weights are `weight * (1 + M(w))`, M of low rank, with rows of length one; then `phi`."""

    def __init__(self, c_in: int, c_out: int, w_dim: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.affine = EqualizedLinear(w_dim, (c_in + c_out) * rank)
        self.weight = nn.Parameter(torch.randn(c_out, c_in))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def weights(self, w: Tensor) -> Tensor:
        """`[B, W]` to `[B, C_out, C_in]`."""
        return modulated_weights(self.affine(w), self.weight, self.rank, 1 / math.sqrt(self.rank))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H, W]`."""
        return bias_act(by_pixel(self.weights(w), x), self.bias)


class ToColours(nn.Module):
    """A 1x1 map to colours whose input w scales."""

    def __init__(self, c_in: int, channels: int, w_dim: int) -> None:
        super().__init__()
        self.affine = EqualizedLinear(w_dim, c_in)
        nn.init.ones_(self.affine.bias)
        self.weight = nn.Parameter(torch.randn(channels, c_in))
        self.bias = nn.Parameter(torch.zeros(channels))

    def weights(self, w: Tensor) -> Tensor:
        """`[B, W]` to `[B, channels, C_in]`."""
        scale: Tensor = self.affine(w)
        return self.weight * scale[:, None] / math.sqrt(self.weight.shape[1])

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, channels, H, W]`."""
        return by_pixel(self.weights(w), x) + self.bias[:, None, None]
