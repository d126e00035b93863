"""The graphs of IHDM, and the two loops that they make: from a start down the levels, and reading off what leads there.

Forward, `begin` rebuilds the blurred image from its few waves, and `step` goes one level down. All but the last call
add noise to the mean; the last adds `residual`, which is zero for samples and what is missing for images that were
encoded.

Inverse, `blur` makes the start of an image, and `read` goes down from the state that `step` will have: each call says
which noise leads from there to the image blurred and noised at the next level, and the last what is missing. Noise may
be rounded on the way, because what follows makes up for it.

A call leads one level down, or further in a loop of fewer calls, which takes `Extrapolation`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hflow_rt.kernels.sampler_update import sampler_update
from hflow_rt.models.family import GraphSpec, Loop, Route, TensorSpec
from hflow_rt.models.ihdm.bank import Waves
from hflow_rt.models.ihdm.blur import cosine_basis, damped, damping
from hflow_rt.models.ihdm.bound import PARTS, bound_draws, mixture_cost, parts, uniformly
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.linear import linear_estimate
from hflow_rt.models.ihdm.network import UNet

if TYPE_CHECKING:
    from hflow_rt.models.ihdm.model import IHDM

__all__ = [
    "Begin",
    "BlurStart",
    "BoundGraph",
    "Change",
    "Extrapolation",
    "Read",
    "Step",
    "folded_network",
    "graphs",
    "level_table",
    "loops",
]

_KNOWN_ABOVE = 0.5  # sigmas: what of a wave is left where the network is taken to know it (spec 14)


def _wide(number: Tensor) -> Tensor:
    """`[B]` beside images."""
    return number[:, None, None, None]


class Begin(nn.Module):
    """A start and its noise to the state at the last level."""

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        self.waves = Waves(config)

    def forward(self, start: Tensor, start_noise: Tensor, delta: Tensor) -> tuple[Tensor]:
        """`[B, C, M]`, `[B, C, R, R]` and `[B]` to `[B, C, R, R]`."""
        return (self.waves.rebuilt(start) + _wide(delta) * start_noise,)


class Extrapolation(nn.Module):
    """From the mean one level sharper to a level beyond, for waves as far as the network can know them (spec 14).

    Waves of the data with mean and variance (mu, S) are damped by E at the mean and by F where it is to lead. One of
    which more is left than noise is amplified by F / E, one that drowned in it stays what it is on average:
    `mu F + g (m - mu E)`, `g = 1 + (F / E - 1) w`, `w = S E^2 / (S E^2 + (sigma / 2)^2)`. One level on, F = E, this
    adds exactly zero.
    """

    basis: Tensor
    moments: Tensor

    def __init__(self, config: IHDMConfig, moments: Tensor) -> None:
        super().__init__()
        self.drowned = (_KNOWN_ABOVE * config.sigma) ** 2
        self.register_buffer("basis", cosine_basis(config.resolution), persistent=False)
        self.register_buffer("moments", moments, persistent=False)

    def forward(self, mean: Tensor, damping: Tensor, reached: Tensor) -> Tensor:
        """`[B, C, R, R]`, and the damping of both levels along an axis, `[1, R]`, to what is added, `[B, C, R, R]`."""
        basis, (average, variance) = self.basis.to(mean), self.moments.to(mean)
        left, further = (axis[:, :, None] * axis[:, None] for axis in (damping, reached))
        # g - 1 without a quotient of two numbers that may both be almost zero
        amplified = variance * left * (further - left) / (variance * left.square() + self.drowned)
        waves = basis @ mean @ basis.T
        added = amplified * (waves - average * left) + average * (further - left)
        found: Tensor = basis.T @ added @ basis
        return found


class Change(nn.Module):
    """What a call adds to its state, before noise. moments: for fewer calls, and for a network beside a linear skip."""

    def __init__(self, network: UNet, moments: Tensor | None) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        self.beyond = None if moments is None else Extrapolation(self.config, moments)

    def forward(
        self, u: Tensor, level: Tensor, damping: Tensor | None, reached: Tensor | None, blurred: Tensor | None
    ) -> Tensor:
        """States `[B, C, R, R]`, biases `[1 or B, W]` and damping of an axis, `[1 or B, R]`, to what is added.

        damping: at the mean. reached: where the call leads, if it may lead beyond that; of a model with moments.
        blurred: at `u`; of a network beside a linear skip.
        """
        if not self.config.linear_skip:
            change = self.network.walk(u, level)
        else:
            assert self.beyond is not None, "settings with linear_skip have moments"
            assert damping is not None
            assert blurred is not None
            basis, moments = self.beyond.basis.to(u), self.beyond.moments.to(u)
            known = linear_estimate(u, blurred, damping, basis, moments, self.config.sigma)
            change = known.sharper - u + known.missed * self.network.walk(torch.cat([u, known.sharp], 1), level)
        if self.beyond is None or reached is None:
            return change
        further: Tensor = self.beyond(u + change, damping, reached)
        return change + further


class Step(nn.Module):
    """One call down. `level` is a row of `level_table`; `goes_on` is 0 in the last call, else 1."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(
        self,
        u: Tensor,
        noise: Tensor,
        residual: Tensor,
        level: Tensor,
        goes_on: Tensor,
        delta: Tensor,
        damping: Tensor | None = None,
        reached: Tensor | None = None,
        blurred: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images `[B, C, R, R]`, `[1, W]`, `[1]` and `[B]` to the next state, and the same as an image in [0, 1].

        damping, reached, blurred: of `Change`, where it takes them.
        """
        change = self.change(u, level, damping, reached, blurred)
        return sampler_update(u, change, noise, residual, goes_on * delta, 1 - goes_on)


class BlurStart(nn.Module):
    """An image and drawn noise to its start, the start's noise, and the state that `Begin` makes of both."""

    basis: Tensor
    damping: Tensor

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        self.sigma = config.sigma
        self.waves = Waves(config)
        self.register_buffer("basis", cosine_basis(config.resolution), persistent=False)
        self.register_buffer("damping", damping(config)[-1], persistent=False)

    def forward(self, image: Tensor, last_noise: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, C, R, R]`, the same and `[B]` to `[B, C, M]`, `[B, C, R, R]` and the same."""
        blurred = damped(image, self.basis.to(image), self.damping.to(image))
        start = self.waves.coefficients(blurred)
        # of the rebuilt start, so that what rebuilding loses is in the noise
        found = self.waves.rebuilt(start)
        start_noise = (blurred - found + self.sigma * last_noise) / _wide(delta)
        return start, start_noise, found + _wide(delta) * start_noise


class Read(nn.Module):
    """What leads one call down; the inputs as in `Step`."""

    basis: Tensor

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change, self.sigma = change, change.config.sigma
        self.register_buffer("basis", cosine_basis(change.config.resolution), persistent=False)

    def forward(
        self,
        u: Tensor,
        image: Tensor,
        target_noise: Tensor,
        level: Tensor,
        goes_on: Tensor,
        reached: Tensor,
        delta: Tensor,
        grid: Tensor,
        damping: Tensor | None = None,
        blurred: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The noise, what is missing after the last call, and the next state, each `[B, C, R, R]`.

        reached: damping of the level that the call leads to. grid: `[B]`, noise is rounded to its multiples; 0 for not
        at all. damping, blurred: of `Change`, where it takes them.
        """
        change = self.change(u, level, damping, reached, blurred)
        noisy, last = _wide(goes_on), _wide(1 - goes_on)
        target = damped(image, self.basis.to(image), reached) + self.sigma * target_noise
        gap = noisy * target + last * image - (u + change)  # at the last, the image to the bit
        noise, residual = _rounded(noisy * gap / _wide(delta), _wide(grid)), last * gap
        # by what decoding will do, to the bit
        u_next, _ = sampler_update(u, change, noise, residual, goes_on * delta, 1 - goes_on)
        return noise, residual, u_next


def _rounded(values: Tensor, grid: Tensor) -> Tensor:
    return torch.where(grid > 0, (values / torch.where(grid > 0, grid, 1)).round() * grid, values)


class BoundGraph(nn.Module):
    """One draw of the bound, see `bound_terms`; the bank is a constant."""

    basis: Tensor
    damping: Tensor
    table: Tensor
    starts: Tensor

    def __init__(self, change: Change, table: Tensor, starts: Tensor) -> None:
        super().__init__()
        self.change, self.config = change, (config := change.config)
        self.waves = Waves(config)
        constants = {"basis": cosine_basis(config.resolution), "damping": damping(config)}
        for name, value in (constants | {"table": table, "starts": starts}).items():
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, image: Tensor, uniform: Tensor, level: Tensor, noise: Tensor, pixel_noise: Tensor
    ) -> tuple[Tensor, ...]:
        """`[B, C, R, R]`, but `level` `[B]`, to the parts in bits per dimension, `[B]`."""
        config, last = self.config, self.config.steps - 1
        x = uniformly(image, uniform, config.bits)
        drawn = (level * last).floor().clamp(0, last - 1).long() + 2
        basis, table, damping = (constant.to(x) for constant in (self.basis, self.table, self.damping))

        def error(index: Tensor, noise: Tensor) -> Tensor:
            u = damped(x, basis, damping[index][:, None, None]) + config.sigma * noise
            mean: Tensor = u + self.change(u, table[index], damping[index - 1], None, damping[index])
            return (damped(x, basis, damping[index - 1][:, None, None]) - mean).square().flatten(1).sum(1)

        blurred = damped(x, basis, damping[-1])
        start = mixture_cost(config, blurred, self.starts.to(x), self.waves, config.delta)
        found = parts(config, start, error(drawn, noise), error(torch.ones_like(drawn), pixel_noise))
        return tuple(found.values())


def level_table(network: UNet) -> Tensor:
    """Biases of all blocks at levels 0 to K, float32 `[K + 1, W]`, computed in float64 (spec 10.2)."""
    exact = copy.deepcopy(network).double()
    level = torch.arange(network.config.steps + 1, device=exact.head.weight.device)
    with torch.no_grad():
        return exact.level_biases(level).float()


def folded_network(network: UNet) -> UNet:
    """A float32 inference copy that takes its biases from a table and has nothing left that makes them."""
    clone = copy.deepcopy(network).float().eval().requires_grad_(False)
    clone.embedding = None
    for block in clone.blocks():
        block.level = None
    return clone


def loops(model: IHDM) -> dict[Route, Loop]:
    """Both routes, from the last level to the first; of fewer calls where the model knows its images' moments."""
    config = model.config
    blurred, axes = (_rows(rows) for rows in (damping(config)[1:], damping(config)[:-1]))
    shared = {
        "level": _rows(level_table(model.network)[1:]),
        "goes_on": np.array([1.0] * (config.steps - 1) + [0.0], np.float32),
    }
    if model.moments is not None:
        shared |= {"damping": axes, "reached": axes}
    if config.linear_skip:
        shared |= {"blurred": blurred}
    carry, leads_to = {"u_next": "u"}, () if model.moments is None else ("goes_on", "reached")
    return {
        "forward": Loop("begin", "step", shared, carry, last=("image",), leads_to=leads_to),
        "inverse": Loop(
            "blur",
            "read",
            shared | {"reached": axes},
            carry,
            last=("residual",),
            every={"z": "noise"},
            leads_to=leads_to,
        ),
    }


def _rows(levels: Tensor) -> NDArray[np.float32]:
    """From the highest level down."""
    found: NDArray[np.float32] = levels.flip(0).float().cpu().numpy()
    return found


def graphs(model: IHDM) -> dict[str, GraphSpec]:
    """Folded graphs by name."""
    config = model.config
    stds = model.prior_std()
    latent = {name: TensorSpec(name, shape, "latent", std=stds[name]) for name, shape in model.latent_shapes().items()}
    image = TensorSpec("image", config.image_shape, "image", (0.0, 1.0))
    u, u_next, z = (TensorSpec(name, config.image_shape, "value") for name in ("u", "u_next", "z"))
    noise, last_noise, target_noise = (
        TensorSpec(name, config.image_shape, "noise") for name in ("noise", "last_noise", "target_noise")
    )
    # below this, which no image shows, reading off divides rounding errors by almost nothing
    delta = TensorSpec("delta", (), "control", (1e-4, 1.0), default=config.delta)
    level = TensorSpec("level", (sum(block.width for block in model.network.blocks()),), "schedule")
    goes_on = TensorSpec("goes_on", (), "schedule", (0.0, 1.0))
    left, reached, blurred = (
        TensorSpec(name, (config.resolution,), "schedule", (0.0, 1.0)) for name in ("damping", "reached", "blurred")
    )
    grid = TensorSpec("grid", (), "grid", default=0.0)
    folded = folded_network(model.network)
    change, exact = Change(folded, model.moments), Change(model.network, model.moments)
    axes = () if model.moments is None else (left, reached)
    before = (blurred,) if config.linear_skip else ()
    made: dict[str, tuple[nn.Module, nn.Module, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "begin": (
            Begin(config).float(),
            Begin(config),
            (latent["start"], latent["start_noise"], delta),
            (u_next,),
        ),
        "step": (
            Step(change).float(),
            Step(exact),
            (u, noise, latent["residual"], level, goes_on, delta, *axes, *before),
            (u_next, image),
        ),
        "blur": (
            BlurStart(config).float(),
            BlurStart(config),
            (image, last_noise, delta),
            (latent["start"], latent["start_noise"], u_next),
        ),
        "read": (
            Read(change).float(),
            Read(exact),
            (u, image, target_noise, level, goes_on, reached, delta, grid, *axes[:1], *before),
            (z, latent["residual"], u_next),
        ),
    }
    if (starts := model.bank().get("start")) is not None:
        table = level_table(model.network)
        made["bound"] = (
            BoundGraph(change, table, starts).float(),
            BoundGraph(exact, table, starts),
            (image, *bound_draws(config)),
            tuple(TensorSpec(name, (), "score") for name in PARTS),
        )
    return {
        name: GraphSpec(name, module, reference, inputs, outputs)
        for name, (module, reference, inputs, outputs) in made.items()
    }
