"""The coupling of a flow step and its subnet (spec 2.5 and 2.6).

The subnet reads the half of the channels that stays. Its output is `[shift]`, or `[shift | scale logits]` for an
affine coupling; other orders of these channels, as in published weights, are permuted when they are read. The coupling
itself is the operator of `kernels/coupling.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.kernels.channels import channel_map
from hflow_rt.kernels.coupling import Form, Region, coupling
from hflow_rt.kernels.coupling_forms import log_det_of, moved
from hflow_rt.kernels.dispatch import takes
from hflow_rt.layers.actnorm import ActNorm
from hflow_rt.layers.border import border_map
from hflow_rt.models.glow.config import Edge, GlowConfig

__all__ = ["BatchNormalizer", "Coupling", "HiddenConv2d", "Subnet", "ZeroConv2d"]


class BatchNormalizer(ActNorm):
    """An actnorm that divides by `std + 1e-6`, with the variance of the batch itself (spec 2.2)."""

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        self.shift.copy_(x.mean(dim=(0, 2, 3)))
        self.log_scale.copy_(torch.log(x.var(dim=(0, 2, 3), correction=0).sqrt() + 1e-6))


class _EdgedConv2d(nn.Module):
    """A convolution that keeps the size: zeros beyond the border, and what `edge` sees there, as a constant map."""

    def __init__(self, c_in: int, c_out: int, kernel: int, edge: Edge, std: float) -> None:
        super().__init__()
        self.edge: Edge = edge if kernel > 1 else "zero"
        self.weight = nn.Parameter(std * torch.randn(c_out, c_in, kernel, kernel))
        self.edge_weight = nn.Parameter(std * torch.randn(c_out, kernel, kernel)) if self.edge == "indicator" else None

    def gain(self) -> Tensor:
        """What multiplies the output's channels, `[C]`."""
        raise NotImplementedError

    def bias_term(self) -> Tensor:
        """What is added before that, `[C]`."""
        raise NotImplementedError

    def effective(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, bias and border taps `[C, k, k]` (None for none) as the layer applies them."""
        gain = self.gain()
        taps = self.weight.sum(1) if self.edge == "ones" else self.edge_weight
        weight, bias = self.weight * gain.view(-1, 1, 1, 1), self.bias_term() * gain
        return weight, bias, None if taps is None else taps * gain.view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H, W]`."""
        weight, bias, taps = self.effective()
        y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        return y if taps is None else y + border_map(taps, *x.shape[2:])


class HiddenConv2d(_EdgedConv2d):
    """With an actnorm on its output, or else a bias; `N(0, 0.05^2)` weights."""

    def __init__(self, c_in: int, c_out: int, kernel: int, config: GlowConfig) -> None:
        # the ones are beyond the border of the last convolution alone
        super().__init__(c_in, c_out, kernel, "indicator" if config.edge == "indicator" else "zero", 0.05)
        self.norm = BatchNormalizer(c_out) if config.hidden == "actnorm" else None
        self.bias = nn.Parameter(torch.zeros(c_out)) if self.norm is None else None

    def gain(self) -> Tensor:
        return self.weight.new_ones(len(self.weight)) if self.norm is None else torch.exp(-self.norm.log_scale)

    def bias_term(self) -> Tensor:
        if self.norm is not None:
            return -self.norm.shift
        assert self.bias is not None
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None and self.norm.initializing:
            y = F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)
            self.norm.inverse(y if self.edge_weight is None else y + border_map(self.edge_weight, *x.shape[2:]))
        return super().forward(x)


class ZeroConv2d(_EdgedConv2d):
    """3x3, starts at zero; the output is multiplied by `exp(3 log_gain)`."""

    def __init__(self, c_in: int, c_out: int, config: GlowConfig) -> None:
        super().__init__(c_in, c_out, 3, config.edge, 0.0)
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.log_gain = nn.Parameter(torch.zeros(c_out))

    def gain(self) -> Tensor:
        return torch.exp(3 * self.log_gain)

    def bias_term(self) -> Tensor:
        return self.bias


class Subnet(nn.Module):
    """3x3, ReLU, 1x1, ReLU, 3x3 starting at zero."""

    def __init__(self, c_in: int, c_out: int, config: GlowConfig) -> None:
        super().__init__()
        self.conv1 = HiddenConv2d(c_in, config.hidden_channels, 3, config)
        self.conv2 = HiddenConv2d(config.hidden_channels, config.hidden_channels, 1, config)
        self.out = ZeroConv2d(config.hidden_channels, c_out, config)

    def forward(self, x: Tensor) -> Tensor:
        """The half that stays, `[B, C_in, H, W]`, to raw shift and scale `[B, C_out, H, W]`."""
        result: Tensor = self.out(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return result


class Coupling(nn.Module):
    """One half of the channels moves by what the subnet makes of the other.

    Both directions take the map of the channels that follows, `weight y + bias`: up to 16 channels it is no pass of its
    own on CUDA.
    """

    def __init__(self, channels: int, config: GlowConfig) -> None:
        super().__init__()
        half = channels // 2
        self.affine = config.coupling == "affine"
        self.form: Form = config.scale if config.coupling == "affine" else "additive"
        self.region = Region(0, half) if config.moving == "first" else Region(half, channels)
        self.net: nn.Module = Subnet(half, channels if self.affine else half, config)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The half of `[B, C, H, W]` that stays, which the subnet reads, and the half that moves."""
        first, second = x.chunk(2, 1)
        return (first, second) if self.region.low else (second, first)

    def move(
        self, x: Tensor, halves: tuple[Tensor, Tensor], raw: Tensor, weight: Tensor | None = None,
        bias: Tensor | None = None, *, inverse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`x`, whose `halves` they are, with one moved by what the subnet gave, and the log-determinant `[B]`.

        Data to latent, `inverse`, is `(x + shift) exp(l)`, with `l` made of the scale logits. The subnet may have run
        in half precision, the flow never does.
        """
        if takes(x):
            shift, logits = raw.chunk(2, 1) if self.affine else (raw, None)
            return coupling(x, logits, shift, weight, bias, self.region, inverse=inverse, form=self.form)
        raw = raw.to(x.dtype)
        shift, logits = raw.chunk(2, 1) if self.affine else (raw, None)
        stays, moving = halves
        moving, minus_s = moved(moving, logits, shift, inverse=inverse, form=self.form)
        y = torch.cat([stays, moving] if self.region.low else [moving, stays], 1)
        return channel_map(y, weight, bias), log_det_of(x, minus_s, inverse)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: `[B, C, H, W]` and the log-determinant `[B]`."""
        halves = self.halves(x)
        return self.move(x, halves, self.net(halves[0]), weight, bias, inverse=False)

    def inverse(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent."""
        halves = self.halves(x)
        return self.move(x, halves, self.net(halves[0]), weight, bias, inverse=True)
