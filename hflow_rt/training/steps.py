"""One step of a plan: in each phase accumulated gradients, clipping and its optimizer, then the average.

A step is a function of the plan, the optimizers' moments and the place in the run (`batches.py`) alone, so a run
that is stopped and resumed is the run that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hflow_rt.models.family import LossTerms
from hflow_rt.models.plan import Phase
from hflow_rt.runs import checkpoints
from hflow_rt.streams import stream_seed
from hflow_rt.training.batches import MicroBatches
from hflow_rt.training.divergence import TERM, broken_values, diverged
from hflow_rt.training.ema import average_weight, update_average
from hflow_rt.training.optimizers import named_parameters
from hflow_rt.training.run import Run
from hflow_rt.training.schedule import learning_rates
from hflow_rt.training.stop import StopRequest

__all__ = ["Steps"]

# fp16: so many steps in a row may overflow while the loss scale looks for its level (it halves each time).
_OVERFLOWS = 24


@dataclass
class _Trained:
    """A phase with what it trains: the optimizer, as accelerate wraps it, and its parameters."""

    index: int
    phase: Phase
    optimizer: Any
    parameters: list[nn.Parameter]
    overflows: int = 0


class Steps:
    """Takes the steps of a run."""

    def __init__(self, run: Run, batches: MicroBatches) -> None:
        self.run, self.batches = run, batches
        self.plan, self.settings, self.processes = run.plan, run.config.training, run.processes
        wrapped = {
            name: self.processes.accelerator.prepare_optimizer(optimizer, device_placement=False)
            for name, optimizer in run.optimizers.items()
        }
        parameters = {
            name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for name, optimizer in run.optimizers.items()
        }
        self.phases = [
            _Trained(index, phase, wrapped[phase.optimizer], parameters[phase.optimizer])
            for index, phase in enumerate(self.plan.phases())
            if phase.optimizer in wrapped  # all of it may be frozen
        ]
        self.others = {
            name: [parameter for other, group in parameters.items() if other != name for parameter in group]
            for name in parameters
        }

    def take(self, stop: StopRequest) -> dict[str, float] | None:
        """One step; values for the log by tag, or None if stopped between its first micro-batches.

        What such a half step has accumulated is dropped: the resumed run takes the whole step again. Tags of phases
        after the first begin with their name.
        """
        place, settings = self.run.place, self.settings
        rates = learning_rates(settings, place.images)
        for optimizer in self.run.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rates[group["name"]]
        logged = {f"learning_rate/{name}": rate for name, rate in rates.items()}
        terms: dict[str, dict[str, float]] = {}
        before = self._own_buffers() if self._may_stop() else []
        for trained in self.phases:
            if place.step % trained.phase.every:
                continue
            former = _kept(self.plan.buffers()) if self.settings.skipped_steps else []
            gradients = self._accumulate(trained, None if terms else stop)
            if gradients is None:
                self._undo_buffers(before)
                return None
            values = self._descend(trained, gradients)
            if values is None:
                _put_back(former)
                logged["skipped_steps"] = 1.0
                continue
            prefix = "" if trained.index == 0 else f"{trained.phase.name}/"
            logged |= {f"{prefix}{tag}": value for tag, value in values.items()}
            named = {tag.removeprefix(TERM): value for tag, value in values.items() if tag.startswith(TERM)}
            terms[trained.phase.name] = named
        self.run.place = self.batches.after(place)
        self.plan.after_step(terms, self.run.place)
        weight = average_weight(settings, self.run.place, self.batches.step_images)
        update_average(self.run.average, self.plan.model, weight)
        return logged

    def _accumulate(self, trained: _Trained, stop: StopRequest | None) -> tuple[list[str], Tensor] | None:
        """Gradients of all micro-batches, averaged over these; tags and means of the losses, still on the device."""
        place, settings, accelerator = self.run.place, self.settings, self.processes.accelerator
        for parameters, needed in ((self.others[trained.phase.optimizer], False), (trained.parameters, True)):
            for parameter in parameters:
                parameter.requires_grad_(needed)
        trained.optimizer.zero_grad()
        tags: list[str] = []
        sums: Tensor | None = None
        for micro in range(settings.accumulate):
            batch = self.batches.get(place, micro, trained.index)
            # of dropout and its like
            torch.manual_seed(stream_seed(settings.seed, place.step, micro, self.processes.rank, trained.index, 1))
            with accelerator.autocast():
                found = self.plan.loss(trained.phase.name, batch, place)
            accelerator.backward(found.loss / settings.accumulate)  # type: ignore[no-untyped-call]
            tags, values = _values(found)
            sums = values if sums is None else sums + values
            if stop is not None and stop.asked and self._may_stop() and micro + 1 < settings.accumulate:
                return None
        assert sums is not None
        return tags, sums / settings.accumulate

    def _descend(self, trained: _Trained, found: tuple[list[str], Tensor]) -> dict[str, float] | None:
        """Move the parameters of a phase against their gradients; its values by tag, None for a step not taken."""
        tags, means = found
        gradients = [parameter.grad for parameter in trained.parameters if parameter.grad is not None]
        self.processes.average([*gradients, *self.plan.buffers(), means])
        self.processes.accelerator.unscale_gradients(trained.optimizer)  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm(gradients)
        # the one place a phase waits for the device
        numbers = torch.cat([means, norm.float().reshape(1)]).tolist()
        logged = dict(zip([*tags, "gradient_norm"], numbers, strict=True))
        skipped = self._is_skipped(trained, logged)
        if not skipped and self.settings.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(trained.parameters, self.settings.grad_clip, norm)
        if not skipped or self.processes.accelerator.scaler is not None:  # which has to see every gradient
            trained.optimizer.step()
        return None if skipped else logged

    def _is_skipped(self, trained: _Trained, logged: dict[str, float]) -> bool:
        """Whether a step would spoil the weights. Raises `TrainingError` for one too many in a row."""
        broken = broken_values(logged)
        only_gradient = len(broken) == 1 and not math.isfinite(logged["gradient_norm"])
        trained.overflows = trained.overflows + 1 if broken else 0
        if not broken:
            return False
        if only_gradient and self.processes.accelerator.scaler is not None and trained.overflows < _OVERFLOWS:
            return False  # the scaler skips this step and tries a smaller scale
        if trained.overflows <= self.settings.skipped_steps:
            return True
        last, remedies = checkpoints(self.run.out)[-1:], self.plan.remedies()
        parameters = named_parameters(self.plan)
        raise diverged(broken, parameters, self.run.place, self.settings, last[0] if last else None, remedies)

    def _may_stop(self) -> bool:
        """Within a step. Several processes must not part ways there; they stop together between steps."""
        return self.processes.count == 1 and self.settings.accumulate > 1

    def _own_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that are not the model's, whose former values the average has."""
        ours = {id(buffer) for buffer in self.plan.model.buffers()}
        return _kept(buffer for buffer in self.plan.buffers() if id(buffer) not in ours)

    def _undo_buffers(self, own: list[tuple[Tensor, Tensor]]) -> None:
        """Take back what the losses of a half step did to running statistics."""
        models = zip(self.plan.model.buffers(), self.run.average.buffers(), strict=True)
        _put_back((*models, *own))


def _kept(buffers: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(buffer, buffer.clone()) for buffer in buffers]


def _put_back(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, former in kept:
        buffer.copy_(former)


def _values(found: LossTerms) -> tuple[list[str], Tensor]:
    """Tags and float32 values of a loss for the log, still on the device."""
    named = {"loss": found.loss}
    if found.bits_per_dim is not None:
        named["bits_per_dim/train"] = found.bits_per_dim
    named |= {f"{TERM}{name}": value for name, value in found.terms.items()}
    return list(named), torch.stack([value.detach().float() for value in named.values()])
