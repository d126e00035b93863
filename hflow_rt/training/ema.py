"""The running average of the weights, which is what a trained model is."""

from copy import deepcopy

import torch
from torch import Tensor

from hflow_rt.models.family import LatentModel
from hflow_rt.models.plan import Place
from hflow_rt.training.config import TrainingConfig

__all__ = ["average_weight", "averaged_copy", "update_average"]


def averaged_copy(model: LatentModel) -> LatentModel:
    """A second model to hold the average: in eval mode, without gradients."""
    average = deepcopy(model)
    average.requires_grad_(False)
    return average.eval()


def average_weight(config: TrainingConfig, place: Place, step_images: int) -> float:
    """Weight of the new weights after the step of `step_images` that ended at `place`."""
    if place.images <= config.ema_warmup_images:
        return 1.0
    if config.ema_half_life_images is not None:
        half_life = config.ema_half_life_images
        if config.ema_ramp is not None:
            half_life = min(half_life, config.ema_ramp * (place.images - step_images))
        return 1.0 - 0.5 ** (step_images / half_life) if half_life else 1.0
    if config.ema_growing:
        return max(config.ema_weight, 9 / (10 + place.step))
    return config.ema_weight


@torch.no_grad()
def update_average(average: LatentModel, model: LatentModel, weight: float) -> None:
    """average <- (1 - weight) average + weight model, in place; with `weight` 1 it is an exact copy.

    Buffers, whose running statistics are averages already, are copied.
    """
    mine: list[Tensor] = list(average.parameters())
    theirs: list[Tensor] = list(model.parameters())
    if weight == 1:
        torch._foreach_copy_(mine, theirs)
    else:
        torch._foreach_lerp_(mine, theirs, weight)
    for held, new in zip(average.buffers(), model.buffers(), strict=True):
        held.copy_(new)
