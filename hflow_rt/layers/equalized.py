"""Convolution and linear layers with equalised learning rate (hflow spec 2.1; Karras et al. 2018, section 4.1).

The stored weight is `N(0, 1) / lr_scale`; the layer multiplies it by `lr_scale * gain / sqrt(fan_in)`, so that
`lr_scale` leaves the initial function alone and multiplies the effective step of Adam.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SLOPE", "Activation", "EqualizedConv2d", "EqualizedLinear", "activate"]

Activation = Literal["linear", "leaky", "tanh"]
SLOPE = 0.1
_LEAKY_GAIN = math.sqrt(2 / (1 + SLOPE**2))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply the activation that belongs to a layer."""
    if activation == "leaky":
        return F.leaky_relu(x, SLOPE)
    return torch.tanh(x) if activation == "tanh" else x


class _Equalized(nn.Module):
    """Parameters and scaling shared by both layers; `bias=False` keeps the tensor and multiplies it by 0."""

    def __init__(
        self,
        shape: tuple[int, ...],
        gain: float,
        activation: Activation,
        lr_scale: float,
        zero: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        fan_in = math.prod(shape[1:])
        self.weight = nn.Parameter(torch.zeros(shape) if zero else torch.randn(shape) / lr_scale)
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        self.activation: Activation = activation
        self.weight_scale = lr_scale * gain / math.sqrt(fan_in)
        self.bias_scale = lr_scale if bias else 0.0

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the layer applies them."""
        return self.weight * self.weight_scale, self.bias * self.bias_scale


class EqualizedConv2d(_Equalized):
    """`[B, C_in, H, W]` to `[B, C_out, H, W]`: stride 1, zero padding, odd kernel, then the activation."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        *,
        activation: Activation = "linear",
        lr_scale: float = 1.0,
        zero: bool = False,
        bias: bool = True,
    ) -> None:
        gain = {"linear": 1.0, "leaky": _LEAKY_GAIN, "tanh": 5 / 3}[activation]
        super().__init__((c_out, c_in, kernel, kernel), gain, activation, lr_scale, zero, bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H, W]`."""
        weight, bias = self.effective()
        return activate(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2), self.activation)

    def fold(self) -> nn.Module:
        """The same map with the scales multiplied into plain weights."""
        weight, bias = self.effective()
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[-1], padding=weight.shape[-1] // 2)
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        return _with_activation(conv, self.activation)


class EqualizedLinear(_Equalized):
    """`[B, C_in]` to `[B, C_out]`, then the activation. tanh takes the leaky gain, as the original does."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        activation: Activation = "linear",
        lr_scale: float = 1.0,
        zero: bool = False,
        bias: bool = True,
    ) -> None:
        gain = 1.0 if activation == "linear" else _LEAKY_GAIN
        super().__init__((c_out, c_in), gain, activation, lr_scale, zero, bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in]` to `[B, C_out]`."""
        return activate(F.linear(x, *self.effective()), self.activation)

    def fold(self) -> nn.Module:
        """The same map with the scales multiplied into plain weights."""
        weight, bias = self.effective()
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        return _with_activation(linear, self.activation)


def _with_activation(layer: nn.Module, activation: Activation) -> nn.Module:
    if activation == "linear":
        return layer
    return nn.Sequential(layer, nn.LeakyReLU(SLOPE) if activation == "leaky" else nn.Tanh())
