"""Looks for values whose images are like given ones, by gradient descent (INR-GAN spec 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["centre_of", "noise_scale", "projected", "rate"]

_RATE = 0.1
_RAMP_UP, _RAMP_DOWN = 0.05, 0.25  # shares of the steps
_NOISE, _NOISE_UNTIL = 0.05, 0.75  # of the spread of the values; until this share of the steps


def rate(step: int, steps: int) -> float:
    """Of Adam: from zero, and back in a cosine."""
    at = step / steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - at) / _RAMP_DOWN))
    return _RATE * down * min(1.0, at / _RAMP_UP)


def noise_scale(step: int, steps: int) -> float:
    """Of what is added to the values while the search is young, in units of their spread."""
    return _NOISE * max(0.0, 1 - step / steps / _NOISE_UNTIL) ** 2


def centre_of(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of values that come in batches `[N, ...]`, float64, and the root of their mean squared distance to it."""
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    count = 0
    for batch in batches:
        exact = batch.double()
        total = total + exact.sum(0)
        squares = squares + exact.square().sum()
        count += len(batch)
    mean = torch.as_tensor(total) / count
    return mean, (torch.as_tensor(squares) / count - mean.square().sum()).clamp(min=0).sqrt()


def projected(
    distance: Callable[[Tensor], Tensor], start: Tensor, spread: Tensor, noise: Iterable[Tensor], steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """By step: values `[B, ...]` after it, and the distances `[B]` that they went down from, each on its own.

    distance: `[B]` of the images of values. noise: standard normal, one tensor a step, of the shape of values or one
    that broadcasts to it.
    """
    values = start.clone().requires_grad_()
    adam = torch.optim.Adam([values], betas=(0.9, 0.999), eps=1e-8)
    for step, drawn in enumerate(noise):
        adam.param_groups[0]["lr"] = rate(step, steps)
        found = distance(values + drawn * (spread * noise_scale(step, steps)))
        adam.zero_grad()
        found.sum().backward()  # type: ignore[no-untyped-call]
        adam.step()
        yield values.detach().clone(), found.detach()
