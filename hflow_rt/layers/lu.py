"""Channel mixing by an LU-factorised matrix, whose log-determinant is a sum (Glow spec 2.3).

Products and inverses are computed in float64 and rounded once, as in `mixing.py`.
"""

import math

import torch
from torch import Tensor, nn

from hflow_rt.layers.mixing import channel_map

__all__ = ["LUMixing"]


class LUMixing(nn.Module):
    """`W = P (tril(lower, -1) + I) (triu(upper, 1) + diag(sign * exp(log_diagonal)))`, starting as a rotation.

    `inverse` (data to latent) multiplies by W, `forward` by its inverse. P picks row `order[i]` as row i. What `lower`
    and `upper` hold outside their triangles has no effect.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation: Tensor = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())
        self.register_buffer("sign", diagonal.sign().float())
        self.register_buffer("order", permutation.argmax(1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The lower and the upper triangular factor in float64."""
        lower, upper = self.lower.double().tril(-1), self.upper.double().triu(1)
        diagonal = self.sign.double() * self.log_diagonal.double().exp()
        return lower + torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper + torch.diag(diagonal)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """W and its inverse in float64."""
        return self._matrix(), self._inverse()

    def forward(self, x: Tensor) -> Tensor:
        """Latent to data, `[B, C]` or `[B, C, H, W]`."""
        return channel_map(x, self._inverse().to(x.dtype))

    def inverse(self, x: Tensor) -> Tensor:
        """Data to latent."""
        return channel_map(x, self._matrix().to(x.dtype))

    def log_det(self, x: Tensor) -> Tensor:
        """Log-determinant of `inverse` at the size of `x`: a scalar, in nats."""
        return (self.log_diagonal.double().sum() * math.prod(x.shape[2:])).to(x.dtype)

    def _matrix(self) -> Tensor:
        lower, upper = self.factors()
        return (lower @ upper)[self.order]

    def _inverse(self) -> Tensor:
        lower, upper = self.factors()
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
        inverse: Tensor = torch.linalg.solve_triangular(upper, solved, upper=True)
        return inverse[:, self.order]
