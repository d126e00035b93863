"""Affine coupling with a bounded log-scale (hflow spec 2.5-2.11; Dinh et al. 2017, eq. 7-8).

`log_scale` and `shift` come raw from the coupling net. They are masked, then clipped, so that positions the net
has seen pass unchanged and both directions apply bit-identical numbers.
"""

import torch
from torch import Tensor

__all__ = ["LOG_SCALE_BOUND", "SHIFT_BOUND", "bound", "coupling_forward", "coupling_inverse"]

LOG_SCALE_BOUND = 3.0
SHIFT_BOUND = 5.0


def bound(log_scale: Tensor, shift: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mask (1 where transformed; None means everywhere) and clip the raw outputs of a coupling net."""
    if mask is not None:
        log_scale, shift = log_scale * mask, shift * mask
    return log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND), shift.clamp(-SHIFT_BOUND, SHIFT_BOUND)


def coupling_forward(x: Tensor, log_scale: Tensor, shift: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Latent to data, `x * exp(s) + b`: returns the result and its log-determinant `[B]`, the sum of `s`."""
    s, b = bound(log_scale, shift, mask)
    return x * torch.exp(s) + b, s.flatten(1).sum(1)


def coupling_inverse(x: Tensor, log_scale: Tensor, shift: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Data to latent, `(x - b) * exp(-s)`: returns the result and its log-determinant `[B]`, minus the sum of `s`."""
    s, b = bound(log_scale, shift, mask)
    return (x - b) * torch.exp(-s), -s.flatten(1).sum(1)
