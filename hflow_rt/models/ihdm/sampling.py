"""Sampling over given noise, as plain torch: what engines are held against (spec 5).

The state `u` goes down the levels: `m = u + f(u, k)`, `u = m + delta * noise`. The result is the last mean, so noise
at level 1 would only be seen in a state nobody needs. Here it is therefore zero where images are drawn, and the last
state is the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hflow_rt.errors import ConfigError

if TYPE_CHECKING:
    from hflow_rt.models.ihdm.model import IHDM

__all__ = ["Noise", "blend", "interpolation_weights", "prior_state", "sample", "states"]

# Level k to the standard normal noise that the step from k to k - 1 adds, `[B or 1, C, R, R]`
Noise = Callable[[int], Tensor]


def prior_state(model: IHDM, images: Tensor, noise: Tensor | None = None, delta: float | None = None) -> Tensor:
    """Where sampling begins: images blurred to the last level, plus `delta * noise`."""
    start = model.blur(images, model.config.steps)
    return start if noise is None else start + _delta(model, delta) * noise


@torch.no_grad()
def states(model: IHDM, start: Tensor, noise: Noise, delta: float | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """From the last level down to 1: the mean one level sharper, and the state that the next step begins with."""
    u = start
    for k in range(model.config.steps, 0, -1):
        mean = model.mean(u, torch.full((len(u),), k, device=u.device))
        u = mean + _delta(model, delta) * noise(k)
        yield mean, u


def sample(model: IHDM, start: Tensor, noise: Noise, delta: float | None = None) -> Tensor:
    """The last mean, `[B, C, R, R]`, not clamped. The noise of level 1 does not matter."""
    mean = start
    for mean, _ in states(model, start, noise, delta):  # noqa: B007 - only the last is wanted
        pass
    return mean


def interpolation_weights(points: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weights `[2, points]` of two starts, linear, and of two noises, cosine and sine, which keeps their variance.

    Raises `ConfigError` for fewer than two points.
    """
    if points < 2:
        raise ConfigError(f"an interpolation needs at least 2 points, not {points}")
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    angle = t * (math.pi / 2)
    return torch.stack([1 - t, t]).to(dtype), torch.stack([angle.cos(), angle.sin()]).to(dtype)


def blend(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Two tensors `[...]` at each of the weights `[2, points]`, `[points, ...]`."""
    return torch.einsum("pn,p...->n...", weights.to(first), torch.stack([first, second]))


def _delta(model: IHDM, delta: float | None) -> float:
    return model.config.delta if delta is None else delta
