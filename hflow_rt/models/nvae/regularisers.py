"""What keeps weights small in training (spec 5): the largest singular values of all convolutions, gains of norms.

Singular vectors are found by power iteration, a few rounds a step from where the last step left them, for all
convolutions of one shape together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hflow_rt.models.nvae.convolution import convolutions, effective_weight

__all__ = ["FIRST_ROUNDS", "ROUNDS", "by_shape", "gain_penalty", "power_iteration", "singular_values", "unit"]

FIRST_ROUNDS, ROUNDS = 40, 4  # of power iteration: from random vectors, from those of the last step
_SMALLEST_NORM = 1e-3

Shape = tuple[int, int]


def by_shape(network: nn.Module) -> dict[Shape, list[nn.Conv2d]]:
    """The convolutions whose effective weight is a matrix of this shape: outputs, values behind one output."""
    found: dict[Shape, list[nn.Conv2d]] = {}
    for conv in convolutions(network).values():
        found.setdefault((conv.weight.shape[0], conv.weight[0].numel()), []).append(conv)
    return found


def matrices(convs: Sequence[nn.Conv2d]) -> Tensor:
    """Effective weights of one shape, `[n, outputs, values]`."""
    return torch.stack([effective_weight(conv).flatten(1) for conv in convs])


def power_iteration(weights: Tensor, left: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Unit singular vectors, left `[n, outputs]` and right `[n, values]`, after `rounds` rounds of `left`."""
    weights, u = weights.detach(), left[:, :, None]
    v = weights.new_zeros(len(weights), weights.shape[2], 1)
    for _ in range(rounds):
        v = unit(weights.mT @ u)
        u = unit(weights @ v)
    return u[:, :, 0], v[:, :, 0]


def singular_values(
    groups: Mapping[Shape, Sequence[nn.Conv2d]], left: Mapping[Shape, Tensor], rounds: int
) -> tuple[dict[Shape, Tensor], dict[Shape, Tensor]]:
    """The largest singular values `[n]` by shape, with gradient, and the left vectors to go on from."""
    values, moved = {}, {}
    for shape, convs in groups.items():
        weights = matrices(convs)
        u, v = power_iteration(weights, left[shape], rounds)
        values[shape] = torch.einsum("no,nov,nv->n", u, weights, v)
        moved[shape] = u
    return values, moved


def gain_penalty(network: nn.Module) -> Tensor:
    """The largest gain of every batch norm, summed."""
    norms = (module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    return torch.stack([norm.weight.abs().max() for norm in norms]).sum()


def unit(vectors: Tensor) -> Tensor:
    """Vectors along axis 1, of length 1 unless they are tiny."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / length.clamp(min=_SMALLEST_NORM)
