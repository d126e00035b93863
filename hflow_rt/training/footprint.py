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

from hflow_rt.draws import generator
from hflow_rt.memory import available, need
from hflow_rt.models.checkpoint import skeleton
from hflow_rt.models.family import LatentModel, conditions_by_folder, loss_draws
from hflow_rt.training.batches import Images
from hflow_rt.training.config import RunConfig, TrainingConfig

__all__ = ["check_batch", "check_model", "saved_bytes"]

# float32 copies of every weight: itself, its gradient, the average, two moments
_COPIES = 5
_FEW, _MORE = 2, 3  # images that are tried; a single one has no spread


def check_model(config: RunConfig, device: torch.device) -> None:
    """Raise `OutOfMemory` unless the weights of such a model can be trained on `device`. Nothing is built."""
    model = skeleton(config.family, config.model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    masks = sum(buffer.nbytes for buffer in model.buffers())
    size = _COPIES * weights + 2 * masks
    need(size, f"a model of {weights // 4:,} parameters", "lower its channels, steps or levels", _room(device))


def check_batch(
    model: LatentModel,
    data: Images,
    indices: NDArray[np.int64],
    training: TrainingConfig,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Raise `OutOfMemory` unless the gradient of a micro-batch fits beside what is in memory by now.

    Measured with two images and with three, as what the loss keeps for the gradient: a step takes that and more.
    """
    if training.batch_size <= _MORE:
        return
    device = next(model.parameters()).device
    few, more = (
        saved_bytes(model, torch.from_numpy(data.pixels(chosen)), [data.names[index] for index in chosen], autocast)
        for chosen in (np.resize(indices, _FEW), np.resize(indices, _MORE))
    )
    need(
        few + (more - few) * (training.batch_size - _FEW),
        f"training.batch_size={training.batch_size}",
        "lower it, and raise training.accumulate to see as many images a step",
        _room(device),
    )


def saved_bytes(
    model: LatentModel,
    pixels: Tensor,
    names: list[str],
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> int:
    """Bytes that the loss of uint8 images `[B, C, R, R]` keeps for its gradient; the model stays as it is."""
    device = next(model.parameters()).device
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would hold its node, which holds it

    before = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        images, noise = loss_draws(model, pixels.to(device), generator(0))
        conditions = {name: rows.to(device) for name, rows in conditions_by_folder(model, names).items()}
        with autocast():
            model.loss(images, noise, conditions)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return sum(kept.values())


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return available()
    torch.cuda.empty_cache()  # what was tried before
    return int(torch.cuda.mem_get_info(device)[0])
