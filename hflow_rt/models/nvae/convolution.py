"""Convolutions whose weights have a trained norm for each output channel (spec 2)."""

import torch
from torch import Tensor, nn

__all__ = ["NormedConv2d", "convolutions", "effective_weight"]

_SMALLEST_NORM = 1e-5


class NormedConv2d(nn.Conv2d):
    """A convolution with weight `exp(log_norm) W / (|W| + 1e-5)`, the norm of each output channel.

    Odd kernels keep the side, or halve it at stride 2. mask: 0/1 like the weight, multiplied before the norm is taken.
    log_gain: added to the initial `log_norm`.
    """

    mask: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        mask: Tensor | None = None,
        log_gain: float = 0.0,
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.register_buffer("mask", mask, persistent=False)
        self.log_norm = nn.Parameter(torch.log(_norm(self._masked().detach()) + 1e-2) + log_gain)

    def _masked(self) -> Tensor:
        return self.weight if self.mask is None else self.weight * self.mask

    def effective_weight(self) -> Tensor:
        """What the input is convolved with."""
        weight = self._masked()
        effective: Tensor = self.log_norm.exp() * weight / (_norm(weight) + _SMALLEST_NORM)
        return effective

    def gain(self) -> Tensor:
        """What the weight is multiplied by for that, float64 `[out]`."""
        gain: Tensor = self.log_norm.double().exp() / (_norm(self._masked().double()) + _SMALLEST_NORM)
        return gain.reshape(-1)

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self._conv_forward(x, self.effective_weight(), self.bias)
        return convolved


def _norm(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
    return norm


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """All convolutions by name, in the order in which they were made."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def effective_weight(conv: nn.Conv2d) -> Tensor:
    """What the input is convolved with, `[out, in / groups, k, k]`."""
    return conv.effective_weight() if isinstance(conv, NormedConv2d) else conv.weight
