"""What a training will take of memory, found out before it is taken: a machine that runs out stops for everybody."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hflow_rt.memory import available, need
from hflow_rt.models.checkpoint import skeleton
from hflow_rt.models.family import conditions_by_folder
from hflow_rt.models.plan import Batch, Place, TrainingPlan, draw
from hflow_rt.streams import generator
from hflow_rt.training.batches import Images
from hflow_rt.training.config import RunConfig, TrainingConfig

__all__ = ["check_batch", "check_model", "saved_bytes"]

_COPIES = 4  # of every weight, float32: itself, its gradient, two moments; one more is the average of a model
_FEW, _MORE = 2, 4  # images that are tried; a single one has no spread, and statistics of groups need even numbers


def check_model(config: RunConfig, device: torch.device) -> None:
    """Raise `OutOfMemory` unless the weights of such a plan can be trained on `device`. Nothing is built."""
    with torch.device("meta"):
        plan = skeleton(config.family, config.model).plan(config.training)
    weights, averaged = (sum(parameter.nbytes for parameter in module.parameters()) for module in (plan, plan.model))
    masks = sum(buffer.nbytes for module in (plan, plan.model) for buffer in module.buffers())
    size = _COPIES * weights + averaged + masks
    need(size, f"a model of {weights // 4:,} parameters", "lower its channels, steps or levels", _room(device))


def check_batch(
    plan: TrainingPlan,
    data: Images,
    indices: NDArray[np.int64],
    training: TrainingConfig,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Raise `OutOfMemory` unless the gradient of a micro-batch fits beside what is in memory by now.

    Measured with two images and with four, as what the loss keeps for the gradient: a step takes that and more.
    """
    if training.batch_size <= _MORE:
        return
    device = next(plan.parameters()).device
    few, more = (
        saved_bytes(plan, torch.from_numpy(data.pixels(chosen)), [data.names[index] for index in chosen], autocast)
        for chosen in (np.resize(indices, _FEW), np.resize(indices, _MORE))
    )
    need(
        few + (more - few) * (training.batch_size - _FEW) // (_MORE - _FEW),
        f"training.batch_size={training.batch_size}",
        "lower it, and raise training.accumulate to see as many images a step",
        _room(device),
    )


def saved_bytes(
    plan: TrainingPlan,
    pixels: Tensor,
    names: list[str],
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> int:
    """Bytes that the loss of uint8 images `[B, C, R, R]` keeps for its gradient, in the phase that keeps most.

    The plan stays as it is.
    """
    return max(_saved_bytes(plan, phase.name, pixels, names, autocast) for phase in plan.phases())


def _saved_bytes(
    plan: TrainingPlan,
    phase: str,
    pixels: Tensor,
    names: list[str],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> int:
    device = next(plan.parameters()).device
    own = {tensor.untyped_storage().data_ptr() for tensor in (*plan.parameters(), *plan.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would hold its node, which holds it

    before = [buffer.clone() for buffer in plan.buffers()]
    drawn = draw(plan.draws(phase), len(pixels), generator(0))
    conditions = conditions_by_folder(plan.model, names)
    moved = ({name: value.to(device) for name, value in values.items()} for values in (drawn, conditions))
    watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), watched, autocast():
        plan.loss(phase, Batch(pixels.to(device), *moved), Place())
    for buffer, value in zip(plan.buffers(), before, strict=True):
        buffer.copy_(value)
    return sum(kept.values())


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return available()
    torch.cuda.empty_cache()  # what was tried before
    return int(torch.cuda.mem_get_info(device)[0])
