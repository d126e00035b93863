"""Looks for the w whose image is like a given one, by gradient descent on one w for all slots (spec section 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["centre_of", "noise_scale", "projected", "rate"]

_RATE = 0.1
_RAMP_UP, _RAMP_DOWN = 0.05, 0.25  # shares of the steps
_NOISE, _NOISE_UNTIL = 0.05, 0.75  # of the spread of w; until this share of the steps


def rate(step: int, steps: int) -> float:
    """Of Adam: from zero, and back in a cosine."""
    at = step / steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - at) / _RAMP_DOWN))
    return _RATE * down * min(1.0, at / _RAMP_UP)


def noise_scale(step: int, steps: int) -> float:
    """Of what is added to w while the search is young, in units of the spread of w."""
    return _NOISE * max(0.0, 1 - step / steps / _NOISE_UNTIL) ** 2


def centre_of(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[W]` of many w `[N, W]`, and the root of their mean squared distance to it."""
    mean = w.mean(0)
    return mean, (w - mean).square().sum(1).mean().sqrt()


def projected(
    distance: Callable[[Tensor], Tensor], start: Tensor, spread: Tensor, noise: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """By step: w `[W]` after it, and the distance that it went down from.

    distance: of the image of a w `[1, W]` to the target, a number. noise: standard normal, `[steps, W]`.
    """
    w = start.clone().requires_grad_()
    adam = torch.optim.Adam([w], betas=(0.9, 0.999), eps=1e-8)
    steps = len(noise)
    for step, drawn in enumerate(noise):
        adam.param_groups[0]["lr"] = rate(step, steps)
        found = distance((w + drawn * (spread * noise_scale(step, steps)))[None])
        adam.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        adam.step()
        yield w.detach().clone(), found.detach()
