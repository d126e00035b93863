"""Priors of the latents (spec 3.1): diagonal Gaussians, of what a level splits off given what it keeps, and of the top.

The latents of the model are deviations in prior standard deviations, so a temperature never moves a mean.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.layers.border import border_map
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.coupling import ZeroConv2d

__all__ = ["Gaussian", "SplitPrior", "TopPrior", "ZeroLinear"]


class Gaussian(NamedTuple):
    """Mean and log-std, which broadcast to `[B, C, H, W]`."""

    mean: Tensor
    log_std: Tensor

    def to(self, dtype: torch.dtype) -> "Gaussian":
        """In the precision of the flow's state."""
        return Gaussian(self.mean.to(dtype), self.log_std.to(dtype))

    def deviation(self, z: Tensor) -> Tensor:
        """Raw values to deviations."""
        return (z - self.mean) * torch.exp(-self.log_std)

    def value(self, deviation: Tensor) -> Tensor:
        """Deviations to raw values."""
        return self.mean + torch.exp(self.log_std) * deviation

    def log_prob(self, deviation: Tensor) -> Tensor:
        """Log-density `[B]` in nats of the raw values that lie at these deviations."""
        # term by term: sums of squares and of log-stds are large and nearly cancel
        terms = -0.5 * deviation.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return terms.flatten(1).sum(1)


def standard_log_prob(deviation: Tensor) -> Tensor:
    """Log-density `[B]` in nats under a standard normal."""
    squares = deviation.flatten(1).square().sum(1)
    return -0.5 * squares - 0.5 * math.log(2 * math.pi) * deviation[0].numel()


class SplitPrior(nn.Module):
    """Of the half that a level splits off, given the half it keeps. The convolution yields `[mean | log_std]`."""

    def __init__(self, config: GlowConfig, level: int) -> None:
        super().__init__()
        channels = config.width(level)
        self.side = config.side(level)
        self.conv = ZeroConv2d(channels // 2, channels, config)

    def forward(self, kept: Tensor) -> Gaussian:
        """`[B, C/2, H, W]` to the prior of as many values."""
        mean, log_std = self.conv(kept).chunk(2, 1)
        return Gaussian(mean, log_std).to(kept.dtype)


class ZeroLinear(nn.Module):
    """Starts at zero; the output is multiplied by `exp(3 log_gain)`."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c_out, c_in))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.log_gain = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, c_in]` to `[B, c_out]`."""
        return F.linear(x, self.weight, self.bias) * torch.exp(3 * self.log_gain)

    def fold(self) -> nn.Linear:
        """The same map with the gain in the weights."""
        gain = torch.exp(3 * self.log_gain)
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        linear.weight, linear.bias = nn.Parameter(self.weight * gain[:, None]), nn.Parameter(self.bias * gain)
        return linear


class TopPrior(nn.Module):
    """Of the coarsest latent: a learned constant with a learned border, plus what the class adds.

    It is what a `ZeroConv2d` makes of an image of zeros, of whose weights only bias and border taps have an effect.
    """

    def __init__(self, config: GlowConfig) -> None:
        super().__init__()
        level = config.levels - 1
        channels, self.side = config.width(level), config.side(level)
        self.learned = config.top_prior == "learned"
        if self.learned:
            self.bias = nn.Parameter(torch.zeros(2 * channels))
            self.log_gain = nn.Parameter(torch.zeros(2 * channels))
        has_border = self.learned and config.edge != "zero"
        self.edge_weight = nn.Parameter(torch.zeros(2 * channels, 3, 3)) if has_border else None
        self.label = ZeroLinear(len(config.classes), 2 * channels) if config.classes else None
        self.channels = channels

    def constant(self) -> Tensor | None:
        """`[1, 2C, H, W]` or `[1, 2C, 1, 1]`: mean and log-std without the class; None for a standard normal."""
        if not self.learned:
            return None
        prior = self.bias[:, None, None]
        if self.edge_weight is not None:
            prior = prior + border_map(self.edge_weight, self.side, self.side)
        return (prior * torch.exp(3 * self.log_gain[:, None, None]))[None]

    def forward(self, like: Tensor, labels: Tensor | None) -> Gaussian | None:
        """The prior in the precision of `like`; labels: one-hot `[B, classes]`. None is a standard normal."""
        prior = self.constant()
        if self.label is not None:
            assert labels is not None
            shift = self.label(labels.to(like.dtype))[:, :, None, None]
            prior = shift if prior is None else prior + shift
        if prior is None:
            return None
        mean, log_std = prior.chunk(2, 1)
        return Gaussian(mean, log_std).to(like.dtype)
