"""How IHDM is trained: one phase, and the bank is made of the first images (spec 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from hflow_rt.models.bins import public_levels
from hflow_rt.models.family import LossTerms, TensorSpec
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan

if TYPE_CHECKING:
    import torch

    from hflow_rt.models.ihdm.model import IHDM

__all__ = ["IHDMPlan", "levels_of"]

_NETWORK = "network"


class IHDMPlan(TrainingPlan):
    """The mean one level sharper is to be right at a random level of every image."""

    model: IHDM

    def __init__(self, model: IHDM) -> None:
        super().__init__()
        self.model = model

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(_NETWORK, _NETWORK),)

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {_NETWORK: {_NETWORK: list(self.model.network.parameters())}}

    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        level = TensorSpec("level", (), "uniform", (0.0, 1.0))
        return level, TensorSpec("noise", self.model.config.image_shape, "noise")

    def start(self, pixels: Tensor, generator: torch.Generator) -> None:
        self.model.know(pixels)

    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        """The squared error, summed over the image, or relative to that of the linear estimate."""
        config = self.model.config
        images = public_levels(batch.pixels, config.bits)
        level = levels_of(batch.draws["level"], config.trained_levels)
        error, unit = self.model.errors_and_units(images, level, batch.draws["noise"])
        return LossTerms((error / unit).mean(), None, {"error": error.detach().mean()})


def levels_of(uniform: Tensor, last: int) -> Tensor:
    """Uniform draws in [0, 1) to levels 1 to `last`, each as likely."""
    return (uniform.double() * last).long().clamp(max=last - 1) + 1
