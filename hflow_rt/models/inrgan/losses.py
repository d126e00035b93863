"""Losses of generator and discriminator (spec section 6); logits are `[B]`, and so are results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.models.inrgan.network import Synthesis

__all__ = ["generator_loss", "judged_loss", "path_lengths", "slope"]


def generator_loss(fake: Tensor) -> Tensor:
    """Low where the discriminator takes generated images for real."""
    return F.softplus(-fake)


def judged_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Low where the discriminator tells them apart."""
    return F.softplus(fake) + F.softplus(-real)


def slope(judge: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Squared norm of the gradient of the logits by real images `[B, C, R, R]`; itself with a gradient."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(judge(images).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3))


def path_lengths(synthesis: Synthesis, w: Tensor, noise: Tensor) -> Tensor:
    """How much images change with w `[B, S, W]`, in the direction of `noise` `[B, C, R, R]`; with a gradient."""
    images = synthesis(w)
    (gradient,) = torch.autograd.grad((images * noise).sum() / images.shape[-1], w, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()
