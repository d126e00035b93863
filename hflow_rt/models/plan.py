"""How a model is trained: phases that each lower a loss with an optimizer of their own, and what belongs to training.

The trainer (`hflow_rt.training`) interprets a plan and knows no family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hflow_rt.models.family import LatentModel, LossTerms, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.evaluation.figures import Figure

__all__ = ["Batch", "Phase", "Place", "TrainingPlan", "draw"]


@dataclass(frozen=True)
class Place:
    """Where a run stands: completed steps, images seen by all processes together, and images to see in all."""

    step: int = 0
    images: int = 0
    total: int = 0


@dataclass(frozen=True)
class Phase:
    """A loss and the optimizer that lowers it, in every `every`-th step, the first one included."""

    name: str
    optimizer: str
    every: int = 1


@dataclass(frozen=True)
class Batch:
    """One micro-batch: uint8 images `[B, C, R, R]`, what was drawn for a phase and conditions `[B, options]`, by name.

    In one step every phase sees the same images and conditions, and draws of its own.
    """

    pixels: Tensor
    draws: Mapping[str, Tensor]
    conditions: Mapping[str, Tensor]


class TrainingPlan(nn.Module, ABC):
    """All that trains. Only `model` is averaged, evaluated, sampled and saved as a model.

    What else the plan holds, parameters and buffers, is in the checkpoint alone. After each phase's gradients,
    processes average all float buffers.
    """

    model: LatentModel

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """What a step does, in this order; the progress line shows the loss of the first."""

    @abstractmethod
    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        """Optimizer to parameter group to parameters; the training settings give each group its learning rate.

        In a phase, parameters of other optimizers need no gradient.
        """

    @abstractmethod
    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        """What is drawn for a micro-batch, in this order: role `noise` standard normal, `uniform` in [0, 1)."""

    def start(self, pixels: Tensor, generator: torch.Generator) -> None:
        """Data-dependent initialisation from uint8 images `[B, C, R, R]`; called once, before the first step."""

    @abstractmethod
    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        """The loss of a micro-batch in the step that begins at `place`. May move running statistics."""

    def after_step(self, terms: Mapping[str, Mapping[str, float]], place: Place) -> None:
        """Called after all phases of a step, which ended at `place`.

        terms: by phase that took part, the `LossTerms.terms`, averaged over micro-batches and processes.
        """

    def remedies(self) -> tuple[str, ...]:
        """What else to try where a loss stops being finite, beside what training settings can do."""
        return ()

    def warning(self, means: Mapping[str, float]) -> str | None:
        """One line, with what to do, if training goes wrong; asked at every evaluation.

        means: of all that was logged since the last one, by tag: `loss` and `terms/NAME` of the first phase,
        `PHASE/loss` and `PHASE/terms/NAME` of the others.
        """
        return None

    def figures(self, average: LatentModel, held_out: NDArray[np.uint8]) -> dict[str, Figure]:
        """What an evaluation tells beside the bounds; held_out: uint8 images `[n, C, R, R]`."""
        return {}


def draw(specs: Iterable[TensorSpec], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What `TrainingPlan.draws` asks for, `[count, *shape]` float32 by name, on the CPU."""
    kinds = {"noise": torch.randn, "uniform": torch.rand}
    return {spec.name: kinds[spec.role](count, *spec.shape, generator=generator) for spec in specs}
