"""Fixed permutations of the channels (Glow spec 2.4): "reverse" and "shuffle". They are part of the saved state."""

import torch
from torch import Tensor, nn

__all__ = ["ChannelPermutation"]


class ChannelPermutation(nn.Module):
    """`inverse` (data to latent): output channel c is input channel `order[c]`; `forward` undoes it."""

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order.to(torch.int64))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The matrix of `inverse` and its inverse, in float64."""
        matrix = torch.eye(len(self.order), dtype=torch.float64, device=self.order.device)[self.order]
        return matrix, matrix.mT

    def forward(self, x: Tensor) -> Tensor:
        """Latent to data, `[B, C, H, W]`."""
        return x[:, torch.argsort(self.order)]

    def inverse(self, x: Tensor) -> Tensor:
        """Data to latent."""
        return x[:, self.order]

    def log_det(self, x: Tensor) -> Tensor:
        """Exactly 0."""
        return x.new_zeros(())
