"""IHDM: images become sharp by undoing heat flow, level by level (Rissanen, Heinonen & Solin, ICLR 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hflow_rt.errors import ConfigError
from hflow_rt.models.bins import public_levels
from hflow_rt.models.family import Bound, Conditions, GraphSpec, LatentModel, Loop, Prior, Route, Unknown, Way
from hflow_rt.models.ihdm.bank import evenly, known, surviving
from hflow_rt.models.ihdm.blur import Blur, cosine_basis, damping
from hflow_rt.models.ihdm.bound import bound_draws, bound_terms, level_cost, uniformly
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.graphs import graphs, loops
from hflow_rt.models.ihdm.linear import linear_estimate
from hflow_rt.models.ihdm.network import UNet
from hflow_rt.models.ihdm.plan import IHDMPlan
from hflow_rt.models.plan import draw

if TYPE_CHECKING:
    from hflow_rt.models.plan import TrainingPlan
    from hflow_rt.training.config import TrainingConfig

__all__ = ["IHDM"]

_BATCH = 64
_BANK_IMAGES = 4096  # that a bank is made of, for a model that came without


def _exactly(like: Tensor) -> torch.autocast:
    """Products of images are not rounded, whatever the network computes in: rounding is as large as the noise."""
    return torch.autocast(like.device.type, enabled=False)


class IHDM(LatentModel):
    """The network and the blur it undoes. Images are `[B, C, R, R]` in [0, 1]; levels int64 `[B]`, 1 to `steps`."""

    config: IHDMConfig
    starts: Tensor | None
    moments: Tensor | None
    basis: Tensor | None
    damping: Tensor | None

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        self.config = config
        self.network = UNet(config)
        self.blur = Blur(config)
        self.start_shape = (config.channels, len(surviving(config)))
        self.register_buffer("starts", torch.zeros(config.bank, *self.start_shape) if config.bank else None)
        self.register_buffer("moments", torch.zeros(2, *config.image_shape) if config.moments else None)
        skips = config.linear_skip
        self.register_buffer("basis", cosine_basis(config.resolution).float() if skips else None, persistent=False)
        self.register_buffer("damping", damping(config).float() if skips else None, persistent=False)

    def mean(self, u: Tensor, level: Tensor) -> Tensor:
        """The expected image one level sharper, given `u` at each image's `level`."""
        return self._mean(u, level)[0]

    def errors(self, images: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the mean at `level`, summed over each image, `[B]`. noise: standard normal."""
        return self.errors_and_units(images, level, noise)[0]

    def errors_and_units(self, images: Tensor, level: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`errors`, and what they would be on average with the linear estimate alone; 1 where there is none."""
        with _exactly(images):
            u = self.blur(images, level) + self.config.sigma * noise
            aim = self.blur(images, level - 1)
        mean, unit = self._mean(u, level)
        return (aim - mean).square().flatten(1).sum(1), unit

    def _mean(self, u: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.linear_skip:
            added: Tensor = self.network(u, level)
            return u + added, u.new_ones(())
        assert self.moments is not None
        assert self.basis is not None
        assert self.damping is not None
        axes = self.damping[level], self.damping[level - 1]
        with _exactly(u):
            known = linear_estimate(u, *axes, self.basis, self.moments, self.config.sigma)
        correction: Tensor = self.network(torch.cat([u, known.sharp], 1), level)
        unit = known.missed.square().flatten() * math.prod(self.config.image_shape)
        return known.sharper + known.missed * correction, unit

    def know(self, pixels: Tensor) -> None:
        """Make the bank and the moments of uint8 images `[N, C, R, R]`, the bank as evenly of them as it has rows."""
        found, of_waves = known(self.config, torch.split(pixels, _BATCH))
        if self.starts is not None:
            self.starts.copy_(evenly(found, len(self.starts)))
        if self.moments is not None:
            self.moments.copy_(of_waves)

    # -- the family contract

    @property
    def resolution(self) -> int:
        return self.config.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """`start`, the surviving waves; `start_noise` on the image of them; `residual`, see `graphs.py`."""
        shape = self.config.image_shape
        return {"start": self.start_shape, "start_noise": shape, "residual": shape}

    def prior_std(self) -> dict[str, float]:
        return {"start": 1.0, "start_noise": float(self.config.noisy_start), "residual": 0.0}

    def prior(self) -> dict[str, Prior]:
        return {"start": "bank", "start_noise": "unscaled", "residual": "unscaled"}

    def ways(self) -> dict[str, Way]:
        """As the original's (spec 5): colours go in a line, noise keeps its variance."""
        return {"start": "line", "start_noise": "arc", "residual": "line"}

    def unknown(self) -> Unknown | None:
        if self.starts is not None:
            return None
        without = "are needed to draw samples and for fewer steps; encoding and decoding go without"
        return Unknown("a bank of starts and moments of waves", _BANK_IMAGES, without)

    def learn(self, batches: Iterable[Tensor]) -> int:
        """Make a bank with a row for every image, and the moments."""
        self.starts, self.moments = known(self.config, batches)
        self.config = self.config.model_copy(update={"bank": len(self.starts), "moments": True})
        return len(self.starts)

    def bank(self) -> dict[str, Tensor]:
        """Starts of training images; none of a published model, which holds no images."""
        return {} if self.starts is None else {"start": self.starts}

    def plan(self, settings: TrainingConfig) -> TrainingPlan:
        return IHDMPlan(self)

    def bounds(self) -> dict[str, Bound]:
        return {"strict": Bound("strict bound", "upper")}

    def bound_inputs(
        self, bound: str, pixels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> dict[str, Tensor]:
        if self.starts is None:
            raise ConfigError("the bound needs a bank of training images, which is the prior; this model has none")
        return {
            "image": public_levels(pixels, self.config.bits),
            **draw(bound_draws(self.config), len(pixels), generator),
        }

    def bound_terms(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return bound_terms(self, inputs)

    def bits_by_step(self, pixels: Tensor, streams: Sequence[torch.Generator]) -> Iterator[Tensor]:
        """From the last level to the first, see `level_cost`."""
        shape = self.config.image_shape

        def each(draw: Callable[..., Tensor]) -> Tensor:
            return torch.stack([draw(shape, generator=stream) for stream in streams]).to(pixels.device)

        x = uniformly(public_levels(pixels, self.config.bits), each(torch.rand), self.config.bits)
        return (level_cost(self, x, level, each(torch.randn)) for level in range(self.config.steps, 0, -1))

    def graphs(self) -> dict[str, GraphSpec]:
        return graphs(self)

    def routes(self) -> dict[Route, Loop]:
        return loops(self)
