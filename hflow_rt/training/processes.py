"""Devices and processes, through accelerate: which device, which precision, and what processes agree on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from accelerate.accelerator import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from hflow_rt.errors import BackendUnavailable, ConfigError

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """This process among those that work together; alone unless started by `accelerate launch`."""

    def __init__(self, device: str, precision: str | None) -> None:
        """device: auto, cpu or cuda. precision: of training; None where nothing is trained, whatever accelerate says.

        Raises `BackendUnavailable` or `ConfigError`.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda; found '{device}'")
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable(
                "device cuda was asked for and torch finds no CUDA device; use --device cpu or auto"
            )
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by `accelerate launch`
        if precision is not None and launched not in ("no", precision):
            raise ConfigError(
                f"accelerate was started with {launched} and training.precision is {precision}; "
                f"add --set training.precision={launched}"
            )
        if not torch.distributed.is_initialized():
            # accelerate keeps the first choice of a process; a second run may choose another device
            AcceleratorState._reset_state(reset_partial_state=True)
        on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision or "no")
        self.device: torch.device = self.accelerator.device
        if device == "cuda" and self.device.type != "cuda":
            raise BackendUnavailable(
                f"device cuda was asked for and accelerate chose {self.device}; check its settings"
            )
        if precision == "fp16" and self.device.type == "cpu":
            raise ConfigError("training.precision fp16 needs a GPU, and this runs on the cpu; use no or bf16")

    @property
    def count(self) -> int:
        """How many processes work together."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Number of this one, from 0."""
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and reports."""
        return bool(self.accelerator.is_main_process)

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each float tensor by its mean over processes, in place, in one exchange.

        Parameters a loss does not use need no special care this way, and accumulation no switch.
        """
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.count == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return bool(found.item())

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that are this process's to work on: every `count`-th."""
        return items[self.rank :: self.count]

    def collect(self, results: list[T]) -> list[T]:
        """What all processes made of their shares, in the order of the items; the same list in each of them."""
        if self.count == 1:
            return results
        found: list[list[T]] = [[] for _ in range(self.count)]
        torch.distributed.all_gather_object(found, results)
        total = sum(map(len, found))
        return [found[index % self.count][index // self.count] for index in range(total)]

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Leave the group of processes."""
        if self.count > 1:
            PartialState().destroy_process_group()  # type: ignore[no-untyped-call]
