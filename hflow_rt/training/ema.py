"""The running average of the weights, which is what a trained model is."""

from copy import deepcopy

import torch
from torch import Tensor

from hflow_rt.models.family import LatentModel

__all__ = ["averaged_copy", "update_average"]


def averaged_copy(model: LatentModel) -> LatentModel:
    """A second model to hold the average: in eval mode, without gradients."""
    average = deepcopy(model)
    average.requires_grad_(False)
    return average.eval()


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
