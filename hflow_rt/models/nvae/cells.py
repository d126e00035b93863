"""Residual cells of both towers and what joins the towers (spec 2): `skip(x) + 0.1 gate(body(x))`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.kernels.squeeze_excite import squeeze_excite
from hflow_rt.models.nvae.batch_norm import BatchNorm
from hflow_rt.models.nvae.convolution import NormedConv2d

__all__ = [
    "SHIFTS",
    "Cell",
    "DecoderCombiner",
    "DownSkip",
    "EncoderCombiner",
    "InvertedResidual",
    "decoder_cell",
    "down_cell",
    "encoder_cell",
    "up_cell",
]

_RESIDUAL = 0.1
SHIFTS = ((0, 0), (1, 1), (0, 1), (1, 0))  # rows and columns dropped, of the four quarters of a down skip
_KERNEL = 5  # of depthwise convolutions


class SqueezeExcite(nn.Module):
    """Adds a branch to what skips it, every channel scaled by a number in (0, 1) that follows from the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, skip: Tensor, y: Tensor) -> Tensor:
        reduce, expand = ((layer.weight, layer.bias) for layer in (self.reduce, self.expand))
        return squeeze_excite(skip, y, reduce, expand, _RESIDUAL)


class DownSkip(nn.Module):
    """Half the side and twice the channels, by four 1x1 convolutions of every second pixel, each of other ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 2
        widths = (quarter, quarter, quarter, 2 * channels - 3 * quarter)
        self.convs = nn.ModuleList(NormedConv2d(channels, width, 1) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        # Copies of every second pixel: convolutions of stride 2 on such a view, channels last, write beyond the end of
        # their memory on a CPU (torch 2.13).
        shifted = (conv(x[:, :, dy::2, dx::2].clone()) for conv, (dy, dx) in zip(self.convs, SHIFTS, strict=True))
        return torch.cat(list(shifted), 1)


class UpSkip(nn.Module):
    """Twice the side and half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = NormedConv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # a 1x1 convolution commutes with interpolation, and costs a fourth before it
        return F.interpolate(self.conv(x), scale_factor=2, mode="bilinear", align_corners=True)


class Unit(nn.Module):
    """Batch norm, swish, 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm = BatchNorm(inputs)
        self.conv = NormedConv2d(inputs, outputs, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.conv(self.norm.swish(x))
        return convolved


class InvertedResidual(nn.Module):
    """Many channels inside, each convolved alone. up: twice the side, and half as many channels out."""

    def __init__(self, channels: int, expansion: int, up: bool = False) -> None:
        super().__init__()
        self.up = up
        hidden, outputs = expansion * channels, channels // 2 if up else channels
        self.norm_in = BatchNorm(channels)
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm_expanded = BatchNorm(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, _KERNEL, padding=_KERNEL // 2, groups=hidden, bias=False)
        self.norm_depthwise = BatchNorm(hidden)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.norm_out = BatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.norm_expanded.swish(self.expand(self.norm_in(x)))
        x = self.norm_depthwise.swish(self.depthwise(x))
        out: Tensor = self.norm_out(self.project(x))
        return out


class Cell(nn.Module):
    """A residual cell. channels: of its output."""

    def __init__(self, skip: nn.Module, body: nn.Module, channels: int, squeeze_excite: bool) -> None:
        super().__init__()
        self.skip = skip
        self.body = body
        self.gate = SqueezeExcite(channels) if squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        skip, y = self.skip(x), self.body(x)
        out: Tensor = skip + _RESIDUAL * y if self.gate is None else self.gate(skip, y)
        return out


def encoder_cell(channels: int, squeeze_excite: bool) -> Cell:
    """Keeps side and channels."""
    body = nn.Sequential(Unit(channels, channels), Unit(channels, channels))
    return Cell(nn.Identity(), body, channels, squeeze_excite)


def down_cell(channels: int, squeeze_excite: bool) -> Cell:
    """Half the side, twice the channels."""
    skip = DownSkip(channels)
    body = nn.Sequential(Unit(channels, 2 * channels, stride=2), Unit(2 * channels, 2 * channels))
    return Cell(skip, body, 2 * channels, squeeze_excite)


def decoder_cell(channels: int, expansion: int, squeeze_excite: bool) -> Cell:
    """Keeps side and channels."""
    return Cell(nn.Identity(), InvertedResidual(channels, expansion), channels, squeeze_excite)


def up_cell(channels: int, expansion: int, squeeze_excite: bool) -> Cell:
    """Twice the side, half the channels."""
    skip = UpSkip(channels)
    return Cell(skip, InvertedResidual(channels, expansion, up=True), channels // 2, squeeze_excite)


class EncoderCombiner(nn.Module):
    """What the encoder stored, plus what the decoder knows at the same group."""

    def __init__(self, encoder_channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.conv = NormedConv2d(decoder_channels, encoder_channels, 1)

    def forward(self, feature: Tensor, state: Tensor) -> Tensor:
        combined: Tensor = feature + self.conv(state)
        return combined


class DecoderCombiner(nn.Module):
    """The decoder's state after it saw the latents of a group."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.conv = NormedConv2d(channels + latent_channels, channels, 1)

    def forward(self, state: Tensor, latent: Tensor) -> Tensor:
        combined: Tensor = self.conv(torch.cat((state, latent), 1))
        return combined
