"""From an image to what the sampler makes it of, as plain torch (spec 14): what engines are held against.

An image has as many latents as there are draws: it is blurred and noised at every level, and the noises that lead from
each of these states to the next are read off. Read off in sequence they lead from the state that decoding will really
have, so that rounding errors do not add up; read off in parallel, from states that decoding only nearly has, which
takes calls of any batch size and is lost far from the training images, where decoding is chaotic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hflow_rt.models.ihdm.blur import damped
from hflow_rt.models.ihdm.graphs import Begin, BlurStart, Read, Step

if TYPE_CHECKING:
    from hflow_rt.models.ihdm.model import IHDM

__all__ = ["Latents", "decoded", "read_parallel", "read_sequence"]


class Latents(NamedTuple):
    """start `[B, C, M]`; start_noise, residual `[B, C, R, R]`; noise `[B, K, C, R, R]`, from the last level down.

    The noise of the last call, which goes to level 0, is zero: `residual` stands in its place.
    """

    start: Tensor
    start_noise: Tensor
    residual: Tensor
    noise: Tensor


@torch.no_grad()
def read_sequence(
    model: IHDM, images: Tensor, draws: Tensor, delta: float | None = None, grid: float | None = None
) -> Latents:
    """Read off level by level, each from the state that the levels above lead to.

    images: `[B, C, R, R]`. draws: standard normal, `[B, K, C, R, R]`, for the states of levels K to 1. grid: round
    noises to its multiples, which what follows makes up for.
    """
    parts, step = _Parts(model, images, delta), Step(model.network)
    start, start_noise, u = parts.blur(images, draws[:, 0], parts.delta)
    if grid is not None:
        start_noise = (start_noise / grid).round() * grid
        (u,) = parts.begin(start, start_noise, parts.delta)
    noise = torch.zeros_like(draws)
    residual = torch.zeros_like(images)
    for index, (row, row_damping) in enumerate(zip(parts.rows, parts.damping, strict=True)):
        # what the last call is to reach is the image, whatever is drawn
        target = draws[:, (index + 1) % len(parts.rows)]
        z, residual, u_next = parts.read(u, images, target, *row, row_damping, parts.delta)
        if grid is not None:
            z = (z / grid).round() * grid
            u_next, _ = step(u, z, residual, *row, parts.delta)
        noise[:, index], u = z, u_next
    return Latents(start, start_noise, residual, noise)


@torch.no_grad()
def read_parallel(model: IHDM, images: Tensor, draws: Tensor, delta: float | None = None) -> Latents:
    """As `read_sequence`, from the states that are aimed at instead of those that are reached."""
    parts, sigma = _Parts(model, images, delta), model.config.sigma
    start, start_noise, u = parts.blur(images, draws[:, 0], parts.delta)
    noise = torch.zeros_like(draws)
    residual = torch.zeros_like(images)
    for index, (row, row_damping) in enumerate(zip(parts.rows, parts.damping, strict=True)):
        target = draws[:, (index + 1) % len(parts.rows)]
        noise[:, index], residual, _ = parts.read(u, images, target, *row, row_damping, parts.delta)
        u = damped(images, parts.read.basis.to(images), row_damping) + sigma * target
    return Latents(start, start_noise, residual, noise)


@torch.no_grad()
def decoded(model: IHDM, latents: Latents, delta: float | None = None) -> Tensor:
    """Images `[B, C, R, R]`, not clamped."""
    parts, step = _Parts(model, latents.residual, delta), Step(model.network)
    u: Tensor
    (u,) = parts.begin(latents.start, latents.start_noise, parts.delta)
    for index, row in enumerate(parts.rows):
        u, _ = step(u, latents.noise[:, index], latents.residual, *row, parts.delta)
    return u


class _Parts:
    """The graphs' functions with the network as it is, and their schedules."""

    def __init__(self, model: IHDM, like: Tensor, delta: float | None) -> None:
        config = model.config
        self.begin, self.blur = Begin(config), BlurStart(config)
        self.read = Read(model.network, config)
        tables = model.routes()["inverse"].schedule
        level, goes_on, self.damping = (
            torch.split(torch.from_numpy(tables[name]).to(like), 1) for name in ("level", "goes_on", "damping")
        )
        self.rows = list(zip(level, goes_on, strict=True))
        self.delta = like.new_full((len(like),), config.delta if delta is None else delta)
