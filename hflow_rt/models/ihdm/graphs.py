"""The graphs of IHDM, and the two loops that they make: from a start down the levels, and reading off what leads there.

Forward, `begin` rebuilds the blurred image from its few waves, and `step` goes one level down. All but the last call
add noise to the mean; the last adds `residual`, which is zero for samples and what is missing for images that were
encoded.

Inverse, `blur` makes the start of an image, and `read` goes down from the state that `step` will have: each call says
which noise leads from there to the image blurred and noised at the next level, and the last what is missing.
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
from hflow_rt.models.ihdm.bank import coefficients, rebuilt, waves
from hflow_rt.models.ihdm.blur import cosine_basis, damped, damping
from hflow_rt.models.ihdm.bound import PARTS, bound_draws, mixture_cost, parts, uniformly
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.network import UNet

if TYPE_CHECKING:
    from hflow_rt.models.ihdm.model import IHDM

__all__ = ["Begin", "BlurStart", "BoundGraph", "Read", "Step", "folded_network", "graphs", "level_table", "loops"]


def _wide(number: Tensor) -> Tensor:
    """`[B]` beside images."""
    return number[:, None, None, None]


class Begin(nn.Module):
    """A start and its noise to the state at the last level."""

    waves: Tensor

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        self.register_buffer("waves", waves(config), persistent=False)

    def forward(self, start: Tensor, start_noise: Tensor, delta: Tensor) -> tuple[Tensor]:
        """`[B, C, M]`, `[B, C, R, R]` and `[B]` to `[B, C, R, R]`."""
        return (rebuilt(start, self.waves) + _wide(delta) * start_noise,)


class Step(nn.Module):
    """One level down. `level` is a row of `level_table`; `goes_on` is 0 in the last call, else 1."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, u: Tensor, noise: Tensor, residual: Tensor, level: Tensor, goes_on: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images `[B, C, R, R]`, `[1, W]`, `[1]` and `[B]` to the next state, and the same as an image in [0, 1]."""
        return sampler_update(u, self.network.walk(u, level), noise, residual, goes_on * delta, 1 - goes_on)


class BlurStart(nn.Module):
    """An image and drawn noise to its start, the start's noise, and the state that `Begin` makes of both."""

    waves: Tensor
    basis: Tensor
    damping: Tensor

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        self.sigma = config.sigma
        self.register_buffer("waves", waves(config), persistent=False)
        self.register_buffer("basis", cosine_basis(config.resolution), persistent=False)
        self.register_buffer("damping", damping(config)[-1], persistent=False)

    def forward(self, image: Tensor, last_noise: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, C, R, R]`, the same and `[B]` to `[B, C, M]`, `[B, C, R, R]` and the same."""
        blurred = damped(image, self.basis.to(image), self.damping.to(image))
        start = coefficients(blurred, self.waves)
        # of the rebuilt start, so that what rebuilding loses is in the noise
        found = rebuilt(start, self.waves)
        start_noise = (blurred - found + self.sigma * last_noise) / _wide(delta)
        return start, start_noise, found + _wide(delta) * start_noise


class Read(nn.Module):
    """What leads one level down. `damping` is that of the level it leads to; the others as in `Step`."""

    basis: Tensor

    def __init__(self, network: UNet, config: IHDMConfig) -> None:
        super().__init__()
        self.network, self.sigma = network, config.sigma
        self.register_buffer("basis", cosine_basis(config.resolution), persistent=False)

    def forward(
        self,
        u: Tensor,
        image: Tensor,
        target_noise: Tensor,
        level: Tensor,
        goes_on: Tensor,
        damping: Tensor,
        delta: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The noise, what is missing after the last call, and the next state, each `[B, C, R, R]`."""
        mean = u + self.network.walk(u, level)
        noisy, last = _wide(goes_on), _wide(1 - goes_on)
        target = damped(image, self.basis.to(image), damping) + self.sigma * target_noise
        gap = noisy * target + last * image - mean  # at the last, the image to the bit
        noise, residual = noisy * gap / _wide(delta), last * gap
        return noise, residual, mean + _wide(goes_on * delta) * noise + last * residual


class BoundGraph(nn.Module):
    """One draw of the bound, see `bound_terms`; the bank is a constant."""

    waves: Tensor
    basis: Tensor
    damping: Tensor
    table: Tensor
    starts: Tensor

    def __init__(self, network: UNet, table: Tensor, starts: Tensor, config: IHDMConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        constants = {"waves": waves(config), "basis": cosine_basis(config.resolution), "damping": damping(config)}
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
            mean = u + self.network.walk(u, table[index])
            return (damped(x, basis, damping[index - 1][:, None, None]) - mean).square().flatten(1).sum(1)

        blurred = damped(x, basis, damping[-1])
        start = mixture_cost(config, blurred, self.starts.to(x), self.waves.to(x), config.delta)
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
    """Both routes, from the last level to the first."""
    config = model.config
    shared = {
        "level": _rows(level_table(model.network)[1:]),
        "goes_on": np.array([1.0] * (config.steps - 1) + [0.0], np.float32),
    }
    target = {"damping": _rows(damping(config)[:-1])}
    carry = {"u_next": "u"}
    return {
        "forward": Loop("begin", "step", shared, carry, last=("image",)),
        "inverse": Loop("blur", "read", shared | target, carry, last=("residual",), every={"z": "noise"}),
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
    damping_row = TensorSpec("damping", (config.resolution,), "schedule", (0.0, 1.0))
    folded = folded_network(model.network)
    made: dict[str, tuple[nn.Module, nn.Module, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "begin": (
            Begin(config).float(),
            Begin(config),
            (latent["start"], latent["start_noise"], delta),
            (u_next,),
        ),
        "step": (
            Step(folded),
            Step(model.network),
            (u, noise, latent["residual"], level, goes_on, delta),
            (u_next, image),
        ),
        "blur": (
            BlurStart(config).float(),
            BlurStart(config),
            (image, last_noise, delta),
            (latent["start"], latent["start_noise"], u_next),
        ),
        "read": (
            Read(folded, config).float(),
            Read(model.network, config),
            (u, image, target_noise, level, goes_on, damping_row, delta),
            (z, latent["residual"], u_next),
        ),
    }
    if (starts := model.bank().get("start")) is not None:
        table = level_table(model.network)
        made["bound"] = (
            BoundGraph(folded, table, starts, config).float(),
            BoundGraph(model.network, table, starts, config),
            (image, *bound_draws(config)),
            tuple(TensorSpec(name, (), "score") for name in PARTS),
        )
    return {
        name: GraphSpec(name, module, reference, inputs, outputs)
        for name, (module, reference, inputs, outputs) in made.items()
    }
