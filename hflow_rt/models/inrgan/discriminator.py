"""The discriminator, which judges images while a generator trains (spec section 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.errors import ConfigError
from hflow_rt.kernels.bias_act import GAIN, bias_act
from hflow_rt.kernels.dispatch import takes
from hflow_rt.layers.equalized import EqualizedLinear
from hflow_rt.models.inrgan.config import FIRST_STAGE, INRGANConfig
from hflow_rt.models.inrgan.layers import phi
from hflow_rt.models.inrgan.network import Mapping

__all__ = ["Discriminator", "check_groups"]

_TAPS = (1.0, 3.0, 3.0, 1.0)
_MAPPING_LAYERS = 8
_HALF = math.sqrt(0.5)
_MOST = 256.0


def _blurred(x: Tensor, pad: int, stride: int = 1) -> Tensor:
    """The small binomial blur of every channel, after padding with zeros."""
    taps = torch.tensor(_TAPS, dtype=x.dtype, device=x.device) / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, padding=pad, stride=stride, groups=x.shape[1])


def check_groups(group: int, batch: int) -> None:
    """Raise `ConfigError` unless a batch is at most one group, or several whole ones."""
    if batch % min(group, batch):
        raise ConfigError(
            f"a micro-batch must be a multiple of discriminator.group = {group}, not {batch}; change "
            "training.batch_size or model.discriminator.group"
        )


class _Conv(nn.Module):
    """A convolution with equalised learning rate."""

    def __init__(self, c_in: int, c_out: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None

    def effective(self) -> Tensor:
        """The weight as it is applied."""
        return self.weight / math.sqrt(math.prod(self.weight.shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.effective(), self.bias)

    def activated(self, x: Tensor, stride: int = 1, pad: int = 0, gain: float = 1.0) -> Tensor:
        """Through `phi`, times the gain; in mixed precision held to what halves can hold."""
        clamp = _MOST * gain if torch.is_autocast_enabled(x.device.type) else None
        own = takes(x)  # elsewhere the convolution adds the bias in passing
        y = F.conv2d(x, self.effective(), None if own else self.bias, stride=stride, padding=pad)
        return bias_act(y, self.bias if own else None, gain=GAIN * gain, clamp=clamp)


class _Block(nn.Module):
    """Half the side, beside a shortcut."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv0 = _Conv(c_in, c_in, 3)
        self.conv1 = _Conv(c_in, c_out, 3)
        self.skip = _Conv(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        short = self.skip.forward(_blurred(x, 1, stride=2))
        x = self.conv0.activated(x, pad=1)
        return _HALF * short + self.conv1.activated(_blurred(x, 2), stride=2, gain=_HALF)


class Discriminator(nn.Module):
    """Images in [-1, 1] to logits, high for real ones."""

    def __init__(self, config: INRGANConfig) -> None:
        super().__init__()
        own = config.discriminator
        self.group = own.group
        top, stages = own.width(FIRST_STAGE), config.stages[::-1]
        self.from_colours = _Conv(config.channels, own.width(config.resolution), 1)
        self.blocks = nn.ModuleList(_Block(own.width(stage), own.width(stage // 2)) for stage in stages[:-1])
        self.conv = _Conv(top + 1, top, 3)
        self.fc = EqualizedLinear(top * FIRST_STAGE**2, top)
        self.out = EqualizedLinear(top, top if config.classes else 1)
        self.mapping = Mapping(0, top, len(config.classes), _MAPPING_LAYERS) if config.classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """`[B, channels, R, R]`, and `[B, options]` of a conditional model, to `[B]`.

        Raises `ConfigError` for a batch that no groups share out.
        """
        x = self.from_colours.activated(images)
        for block in self.blocks:
            x = block(x)
        x = self.conv.activated(self._with_spread(x), pad=1)
        x = self.out.forward(phi(self.fc(x.flatten(1))))
        if self.mapping is None:
            return x.squeeze(1)
        label = self.mapping.forward(None, labels)
        return (x * label).sum(1) / math.sqrt(label.shape[1])

    def _with_spread(self, x: Tensor) -> Tensor:
        """A further channel: how much images of a group differ. Groups are formed by stride."""
        size = min(self.group, len(x))
        check_groups(size, len(x))
        groups = x.reshape(size, -1, *x.shape[1:])
        std = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        return torch.cat([x, std.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)
