"""What exact flows share: trained on their likelihood, with noise that spreads each pixel over its bin."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hflow_rt.models.bins import in_bins
from hflow_rt.models.family import Conditions, LatentModel, LossTerms, TensorSpec
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan

if TYPE_CHECKING:
    from hflow_rt.training.config import TrainingConfig

__all__ = ["FlowModel", "FlowPlan", "InversePass"]

_FLOW = "flow"


@dataclass(frozen=True)
class InversePass:
    """What `inverse` yields: latents by name, and `log_prob` `[B]` in nats (see `LatentModel`)."""

    latents: dict[str, Tensor]
    log_prob: Tensor


class FlowModel(LatentModel):
    """A model with an exact inverse and a density. Inside, images are in [-0.5, 0.5), see `bins`."""

    @property
    def bits(self) -> int:
        """Of each value of an image; 8, unless the settings say fewer."""
        bits: int = self.config.bits  # type: ignore[attr-defined]  # every flow's settings have it
        return bits

    @abstractmethod
    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Latents to images `[B, C, R, R]` in [0, 1] (clamped). Raises `DataError` if a latent does not fit."""

    @abstractmethod
    def encode(self, images: Tensor, conditions: Conditions | None = None) -> InversePass:
        """Images `[B, C, R, R]` in [0, 1] to latents and log-probability. Raises `DataError` on a wrong shape."""

    @abstractmethod
    def folded(self) -> FlowModel:
        """A float32 inference copy of the same map with every constant folded in float64."""

    @abstractmethod
    def loss(
        self, images: Tensor, noise: Mapping[str, Tensor] | None = None, conditions: Conditions | None = None
    ) -> LossTerms:
        """Training loss of images `[B, C, R, R]` in [-0.5, 0.5).

        `noise` gives every standard normal draw by name (`noise_shapes`, each `[B, *shape]`); without it they
        come from torch's default generator.
        """

    @abstractmethod
    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes without batch of the standard normal draws of one loss, in the order they are used."""

    @abstractmethod
    def initialize(self, pixels: Tensor, generator: torch.Generator) -> None:
        """Data-dependent initialisation from uint8 images `[B, C, R, R]`; called once before training."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the groups that have learning rates."""

    def dequantize(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """uint8 images to [-0.5, 0.5) with uniform noise in each bin, drawn on the CPU.

        Without a generator every pixel stands at the centre of its bin.
        """
        if generator is None:
            return in_bins(pixels, self.bits)
        return in_bins(pixels, self.bits, torch.rand(pixels.shape, generator=generator).to(pixels.device))

    def plan(self, settings: TrainingConfig) -> FlowPlan:
        return FlowPlan(self, settings)


class FlowPlan(TrainingPlan):
    """One phase. Pixels get uniform noise in their bins and Gaussian noise of `training.added_noise_std`."""

    model: FlowModel

    def __init__(self, model: FlowModel, settings: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.added_noise_std = settings.added_noise_std

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(_FLOW, _FLOW),)

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {_FLOW: self.model.parameter_groups()}

    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        image = (self.model.channels, self.model.resolution, self.model.resolution)
        added = [TensorSpec("added", image, "noise")] if self.added_noise_std else []
        noises = (TensorSpec(name, shape, "noise") for name, shape in self.model.noise_shapes().items())
        return (TensorSpec("uniform", image, "uniform"), *added, *noises)

    def start(self, pixels: Tensor, generator: torch.Generator) -> None:
        self.model.initialize(pixels, generator)

    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        noise = dict(batch.draws)
        images = in_bins(batch.pixels, self.model.bits, noise.pop("uniform"))
        if self.added_noise_std:
            images = images + self.added_noise_std * noise.pop("added")
        return self.model.loss(images, noise, batch.conditions)
