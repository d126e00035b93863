"""Flow chains and priors with their constants folded (spec 12.2); built of float64 copies, see `layers/fold.py`.

A step becomes one 1x1 map and a coupling whose convolutions carry all gains. What indicator channels and ones beyond
the border add is a constant map; before the wide hidden layer it is an input channel of ones instead, because a map
would be larger than the weights there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.kernels.mixing import mixing
from hflow_rt.layers.border import border_map
from hflow_rt.layers.fold import Folds
from hflow_rt.models.glow.coupling import Coupling, HiddenConv2d, Subnet, ZeroConv2d
from hflow_rt.models.glow.flow import ChainResult, FlowChain, FlowStep
from hflow_rt.models.glow.prior import Gaussian, SplitPrior, TopPrior, standard_log_prob

__all__ = ["FOLDS", "FoldedChain", "FoldedClassPrior", "FoldedSplitPrior", "FoldedTopPrior"]


class FoldedConv2d(nn.Module):
    """A convolution with plain weights.

    ones: there is one more input channel, of ones. border: a constant `[1, C, H, W]` to add.
    """

    border: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor, *, ones: bool = False, border: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.ones = ones
        self.register_buffer("border", border)

    def forward(self, x: Tensor) -> Tensor:
        if self.ones:
            x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)
        y = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        return y if self.border is None else y + self.border


def _hidden(conv: HiddenConv2d) -> FoldedConv2d:
    """Taps that see outside are all taps less those that see inside, which are a convolution of ones."""
    weight, bias, taps = conv.effective()
    if taps is None:
        return FoldedConv2d(weight, bias)
    return FoldedConv2d(torch.cat([weight, -taps[:, None]], 1), bias + taps.sum((1, 2)), ones=True)


def _zero_conv(conv: ZeroConv2d, side: int) -> FoldedConv2d:
    weight, bias, taps = conv.effective()
    border = None if taps is None else border_map(taps, side, side)[None]
    return FoldedConv2d(weight, bias, border=border)


def _folded(coupling: Coupling, side: int) -> Coupling:
    """`coupling` itself, its net with all gains in the weights."""
    net = coupling.net
    assert isinstance(net, Subnet)
    layers = (_hidden(net.conv1), nn.ReLU(), _hidden(net.conv2), nn.ReLU(), _zero_conv(net.out, side))
    coupling.net = nn.Sequential(*layers)
    return coupling


class ChannelMap(nn.Module):
    """What `weight x + bias` needs to know, `[C, C]` and `[C]`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())


class FoldedChain(nn.Module):
    """Both directions of a `FlowChain`; log-determinants of actnorm and mixing are one constant."""

    constant: Tensor

    def __init__(self, chain: FlowChain) -> None:
        super().__init__()
        steps = [step for step in chain.steps if isinstance(step, FlowStep)]
        self.couplings = nn.ModuleList(_folded(step.coupling, chain.side) for step in steps)
        self.into, self.back = nn.ModuleList(), nn.ModuleList()
        like = torch.zeros(1, 1, chain.side, chain.side, dtype=torch.float64)
        for step in steps:
            matrix, undone = step.mixing.matrices()
            scale, shift = step.actnorm.log_scale.exp(), step.actnorm.shift
            scaled = matrix / scale
            self.into.append(ChannelMap(scaled, -scaled @ shift))
            self.back.append(ChannelMap(undone * scale[:, None], shift))
        self.register_buffer("constant", torch.stack([step.constant(like) for step in steps]).sum())

    def forward(self, x: Tensor) -> ChainResult:
        """Latent to data."""
        log_dets: list[Tensor] = []
        for coupling, back in zip(reversed(self.couplings), reversed(self.back), strict=True):
            x, log_det = coupling(x, back.weight, back.bias)
            log_dets.insert(0, log_det)
        return ChainResult(x, torch.stack(log_dets), -self.constant)

    def inverse(self, x: Tensor) -> ChainResult:
        """Data to latent: every coupling goes on to the map of the next step."""
        log_dets: list[Tensor] = []
        first, *following = [(into.weight, into.bias) for into in self.into if isinstance(into, ChannelMap)]
        x = mixing(x, *first)
        for coupling, after in zip(self.couplings, [*following, (None, None)], strict=True):
            x, log_det = coupling.inverse(x, *after)  # type: ignore[operator]
            log_dets.append(log_det)
        return ChainResult(x, torch.stack(log_dets), self.constant)


class FoldedSplitPrior(nn.Module):
    """`SplitPrior` with its gains in the weights."""

    def __init__(self, prior: SplitPrior) -> None:
        super().__init__()
        self.conv = _zero_conv(prior.conv, prior.side)

    def forward(self, kept: Tensor) -> Gaussian:
        """`[B, C/2, H, W]` to the prior of as many values."""
        return Gaussian(*self.conv(kept).chunk(2, 1))


class FoldedTopPrior(nn.Module):
    """A `TopPrior` without classes: mean and stds are constants `[1, C, H, W]`."""

    mean: Tensor
    std: Tensor
    inverse_std: Tensor
    log_det: Tensor

    def __init__(self, prior: Gaussian, side: int) -> None:
        super().__init__()
        mean, log_std = (values.expand(1, -1, side, side) for values in prior)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", log_std.exp())
        self.register_buffer("inverse_std", (-log_std).exp())
        self.register_buffer("log_det", -log_std.sum())

    def forward(self, like: Tensor, labels: Tensor | None) -> "FoldedTopPrior":
        """Itself: there is nothing to compute."""
        return self

    def deviation(self, z: Tensor) -> Tensor:
        """Raw values to deviations."""
        return (z - self.mean) * self.inverse_std

    def value(self, deviation: Tensor) -> Tensor:
        """Deviations to raw values."""
        return self.mean + self.std * deviation

    def log_prob(self, deviation: Tensor) -> Tensor:
        """Log-density `[B]` in nats of the raw values that lie at these deviations."""
        return standard_log_prob(deviation) + self.log_det


class FoldedClassPrior(nn.Module):
    """A `TopPrior` of classes: its constant, and a linear map of the labels."""

    base: Tensor | None

    def __init__(self, prior: TopPrior) -> None:
        super().__init__()
        assert prior.label is not None
        self.register_buffer("base", prior.constant())
        self.label = prior.label.fold()

    def forward(self, like: Tensor, labels: Tensor) -> Gaussian:
        """The prior; labels: one-hot `[B, classes]`."""
        shift = self.label(labels)[:, :, None, None]
        prior = shift if self.base is None else self.base + shift
        return Gaussian(*prior.chunk(2, 1))


def _top_prior(prior: TopPrior) -> nn.Module:
    """A prior of classes, a constant one, or itself where nothing is learned."""
    if prior.label is not None:
        return FoldedClassPrior(prior)
    constant = prior.constant()
    return prior if constant is None else FoldedTopPrior(Gaussian(*constant.chunk(2, 1)), prior.side)


FOLDS: Folds = {FlowChain: FoldedChain, SplitPrior: FoldedSplitPrior, TopPrior: _top_prior}
