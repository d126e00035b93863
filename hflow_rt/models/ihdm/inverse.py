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

from hflow_rt.models.ihdm.blur import damped, damping
from hflow_rt.models.ihdm.graphs import Begin, BlurStart, Change, Read, Step

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
def read_sequence(model: IHDM, images: Tensor, draws: Tensor, delta: float | None = None, grid: float = 0.0) -> Latents:
    """Read off level by level, each from the state that the levels above lead to.

    images: `[B, C, R, R]`. draws: standard normal, `[B, K, C, R, R]`, for the states of levels K to 1. grid: round
    noises to its multiples, which what follows makes up for; 0 for not at all.
    """
    parts = _Parts(model, images, delta)
    start, start_noise, u = parts.blur(images, draws[:, 0], parts.delta)
    noise = torch.zeros_like(draws)
    residual = torch.zeros_like(images)
    for index, row in enumerate(parts.rows):
        # what the last call is to reach is the image, whatever is drawn
        target = draws[:, (index + 1) % len(parts.rows)]
        noise[:, index], residual, u = parts.read(u, images, target, *row, grid)
    return Latents(start, start_noise, residual, noise)


@torch.no_grad()
def read_parallel(model: IHDM, images: Tensor, draws: Tensor, delta: float | None = None) -> Latents:
    """As `read_sequence`, from the states that are aimed at instead of those that are reached."""
    parts, sigma = _Parts(model, images, delta), model.config.sigma
    start, start_noise, u = parts.blur(images, draws[:, 0], parts.delta)
    noise = torch.zeros_like(draws)
    residual = torch.zeros_like(images)
    for index, row in enumerate(parts.rows):
        target = draws[:, (index + 1) % len(parts.rows)]
        noise[:, index], residual, _ = parts.read(u, images, target, *row)
        u = damped(images, parts.basis, row.reached) + sigma * target
    return Latents(start, start_noise, residual, noise)


@torch.no_grad()
def decoded(model: IHDM, latents: Latents, delta: float | None = None) -> Tensor:
    """Images `[B, C, R, R]`, not clamped."""
    parts = _Parts(model, latents.residual, delta)
    step = Step(parts.change)
    u: Tensor
    (u,) = parts.begin(latents.start, latents.start_noise, parts.delta)
    for index, row in enumerate(parts.rows):
        given = u, latents.noise[:, index], latents.residual, row.level, row.goes_on, parts.delta
        u, _ = step(*given, damping=row.reached, blurred=row.blurred)
    return u


class _Row(NamedTuple):
    level: Tensor
    goes_on: Tensor
    reached: Tensor
    blurred: Tensor


class _Parts:
    """The graphs' functions with the network as it is, and their schedules."""

    def __init__(self, model: IHDM, like: Tensor, delta: float | None) -> None:
        config = model.config
        self.begin, self.blur = Begin(config), BlurStart(config)
        self.change = Change(model.network, model.moments)
        self._read = Read(self.change)
        self.basis = self._read.basis.to(like)
        tables = {"blurred": damping(config)[1:].flip(0).numpy(), **model.routes()["inverse"].schedule}
        columns = (torch.split(torch.from_numpy(tables[name]).to(like), 1) for name in _Row._fields)
        self.rows = [_Row(*row) for row in zip(*columns, strict=True)]
        self.delta = like.new_full((len(like),), config.delta if delta is None else delta)

    def read(
        self, u: Tensor, images: Tensor, target_noise: Tensor, level: Tensor, goes_on: Tensor, reached: Tensor,
        blurred: Tensor, grid: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As the graph."""
        grids = torch.full_like(self.delta, grid)
        found: tuple[Tensor, Tensor, Tensor] = self._read(
            u, images, target_noise, level, goes_on, reached, self.delta, grids, reached, blurred
        )
        return found
