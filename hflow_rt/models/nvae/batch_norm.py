"""Batch norm as NVAE trains it (spec 2): of the images of all processes, and still while activations are recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from hflow_rt.kernels.batch_norm import batch_norm_silu
from hflow_rt.kernels.dispatch import takes

__all__ = ["BatchNorm", "standing_still"]


class _Mean(torch.autograd.Function):
    """The mean of a tensor over processes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _mean(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _mean(gradient)  # of the mean of all losses, once trainers average what processes find


class BatchNorm(nn.BatchNorm2d):
    """Running statistics move by 0.05 a step, the variance by its unbiased estimate.

    In training every process must see as many images as the others.
    """

    moves = True  # whether running statistics follow those of the batch

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.05)

    def swish(self, x: Tensor) -> Tensor:
        """Of the norm."""
        if not (self.training and takes(x)) or _processes() > 1:
            return F.silu(self(x))
        made, mean, variance = batch_norm_silu(x, self.weight, self.bias)
        if self.moves:
            self._move(mean, variance, x.numel() / x.shape[1])
        return made

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if _processes() > 1:
            return self._together(x)
        if self.moves:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        # copies move instead, because a second pass has to keep as many tensors as the first
        copies = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, *copies, self.weight, self.bias, training=True, eps=self.eps)

    def _together(self, x: Tensor) -> Tensor:
        """torch has this for GPUs alone, and without a way to keep the statistics."""
        values, over = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, (0, 2, 3)
        mean: Tensor = _Mean.apply(values.mean(over))  # type: ignore[no-untyped-call]
        centred = values - mean[:, None, None]
        variance: Tensor = _Mean.apply(centred.square().mean(over))  # type: ignore[no-untyped-call]
        if self.moves:
            self._move(mean, variance, _processes() * x.numel() / x.shape[1])
        gain = self.weight * (variance + self.eps).rsqrt()
        normed = centred * gain[:, None, None] + self.bias[:, None, None]
        return normed.to(x.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Running statistics by those of a batch of so many pixels."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum or 0.0)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum or 0.0)


@contextmanager
def standing_still(module: nn.Module) -> Iterator[None]:
    """Inside, running statistics of batch norms stay as they are."""
    norms = [norm for norm in module.modules() if isinstance(norm, BatchNorm)]
    try:
        for norm in norms:
            norm.moves = False
        yield
    finally:
        for norm in norms:
            norm.moves = True


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _mean(value: Tensor) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total / _processes()
