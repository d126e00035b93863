"""Losses of generator and discriminator (spec section 6); logits are `[B]`, and so are results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.models.inrgan.discriminator import Discriminator

__all__ = ["generator_loss", "judged_loss", "slope"]


def generator_loss(fake: Tensor) -> Tensor:
    """Low where the discriminator takes generated images for real."""
    return F.softplus(-fake)


def judged_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Low where the discriminator tells them apart."""
    return F.softplus(fake) + F.softplus(-real)


def slope(discriminator: Discriminator, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Squared norm of the gradient of the logits by real images `[B, C, R, R]`; itself with a gradient."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images, labels).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3))
