"""Step boundaries of a flow chain: actnorm of one step and mixing of the next, merged, and what runs them fused.

A chain of n steps has n couplings and n + 1 affine maps of the channels around them, in either direction. The first
also takes the level's outer map of every element on its way in, and the last coupling passes through the other one, so
that a level of n steps is n + 1 passes (spec 7.2).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hflow_rt.kernels.channels import Elementwise
from hflow_rt.kernels.coupling import Region, coupling
from hflow_rt.kernels.mixing import mixing

if TYPE_CHECKING:
    from hflow_rt.models.hflow.flow import FlowStep

__all__ = ["Boundary", "boundaries", "run_fused"]

Net = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Boundary(NamedTuple):
    """`weight x + bias` over the channels: `[C, C]`, or `[C]` for a diagonal, and `[C]`. `undo` inverts `weight`."""

    weight: Tensor
    bias: Tensor
    undo: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Boundary":
        """Rounded to what the flow runs in."""
        undo = None if self.undo is None else self.undo.detach().to(dtype)
        return Boundary(self.weight.to(dtype), self.bias.to(dtype), undo)


def boundaries(steps: Sequence["FlowStep"]) -> tuple[list[Boundary], list[Boundary]]:
    """The n + 1 maps of a chain latent to target, then those target to latent, each in the order of running; float64.

    All steps are computed together and gradients reach their parameters.
    """
    first = steps[0].mixing
    matrix, undone = first.pair(torch.stack([step.mixing.weight for step in steps]), first.scale)
    log_scale = torch.stack([step.actnorm.log_scale for step in steps]).double()
    shift = torch.stack([step.actnorm.shift for step in steps]).double()
    scale = torch.exp(log_scale)
    # the actnorm before each mixing, latent to target; before the first there is none
    scale_before = torch.cat([torch.ones_like(scale[:1]), scale[:-1]])
    shift_before = torch.cat([torch.zeros_like(shift[:1]), shift[:-1]])
    forward, inverse = undone * scale_before[:, None, :], matrix / scale_before[:, :, None]
    forward_bias = (undone @ shift_before[:, :, None])[:, :, 0]
    inverse_bias = -shift_before / scale_before
    up = [Boundary(*maps) for maps in zip(forward, forward_bias, inverse, strict=True)]
    down = [Boundary(*maps) for maps in zip(inverse, inverse_bias, forward, strict=True)]
    grown, shrunk = scale[-1], 1 / scale[-1]
    last, first_down = Boundary(grown, shift[-1], shrunk), Boundary(shrunk, -shift[-1] * shrunk, grown)
    return [*up, last], [first_down, *reversed(down)]


def run_fused(
    x: Tensor,
    condition: Tensor | None,
    nets: Sequence[Net],
    regions: Sequence[Region],
    maps: Sequence[Boundary],
    inverse: bool,
    pre: Elementwise,
    post: Elementwise,
) -> tuple[Tensor, list[Tensor]]:
    """A whole level in the order of running, by the kernels: its result and each coupling's log-determinant `[B]`."""
    x = mixing(x, maps[0].weight, maps[0].bias, pre=pre, inverse=inverse)
    log_dets = []
    for at, (net, region, (weight, bias, undo)) in enumerate(zip(nets, regions, maps[1:], strict=True), start=1):
        log_scale, shift = net(x, condition)
        x, log_det = coupling(
            x, log_scale, shift, weight, bias, region,
            inverse=inverse, form="clipped", undo=undo, post=post if at == len(nets) else None,
        )  # fmt: skip
        log_dets.append(log_det)
    return x, log_dets
