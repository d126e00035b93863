"""How INR-GAN is trained: generator, discriminator, and a gradient penalty every so many steps (spec section 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hflow_rt.models.bins import public_levels
from hflow_rt.models.family import LossTerms, TensorSpec
from hflow_rt.models.inrgan.discriminator import Discriminator
from hflow_rt.models.inrgan.losses import generator_loss, judged_loss, slope
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan

if TYPE_CHECKING:
    from hflow_rt.models.inrgan.model import INRGAN

__all__ = ["INRGANPlan"]

GENERATOR, DISCRIMINATOR, PENALTY = "generator", "discriminator", "penalty"


class INRGANPlan(TrainingPlan):
    """The generator is to be taken for real; the discriminator is to tell, and to be smooth at real images.

    Labels of generated images are those of the real ones of the step.
    """

    model: INRGAN

    def __init__(self, model: INRGAN) -> None:
        super().__init__()
        self.model = model
        self.discriminator = Discriminator(model.config)

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(GENERATOR, GENERATOR),
            Phase(DISCRIMINATOR, DISCRIMINATOR),
            Phase(PENALTY, DISCRIMINATOR, every=self.model.config.r1_every),
        )

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {
            GENERATOR: {GENERATOR: list(self.model.parameters())},
            DISCRIMINATOR: {DISCRIMINATOR: list(self.discriminator.parameters())},
        }

    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        return () if phase == PENALTY else (TensorSpec("z", (self.model.config.z_dim,), "noise"),)

    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        """Of the penalty, as much as all the steps since the last one would have of it."""
        config, labels = self.model.config, self.model.labels(batch.conditions)
        if phase == GENERATOR:
            logits = self.discriminator(self._generated(batch.draws["z"], labels), labels)
            return LossTerms(generator_loss(logits).mean(), None, {"fooled": _positive(logits)})
        real = public_levels(batch.pixels, config.bits) * 2 - 1
        if phase == PENALTY:
            steepness = slope(self.discriminator, real, labels).mean()
            return LossTerms(config.r1_gamma / 2 * config.r1_every * steepness, None, {"slope": steepness.detach()})
        with torch.no_grad():
            images = self._generated(batch.draws["z"], labels)
        fake, judged = self.discriminator(images, labels), self.discriminator(real, labels)
        terms = {"real": _positive(judged), "fake": _positive(fake)}
        return LossTerms(judged_loss(fake, judged).mean(), None, terms)

    def _generated(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Images of z without truncation; moves the running mean of w."""
        w = self.model.mapping(z, labels)
        self.model.follow(w)
        images: Tensor = self.model.synthesis(self.model.slots(w))
        return images


def _positive(logits: Tensor) -> Tensor:
    """How many of them say that an image is real."""
    return (logits.detach() > 0).float().mean()
