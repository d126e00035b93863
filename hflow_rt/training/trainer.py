"""The training loop: steps of a plan until images, minutes or the user's patience end, with all that happens between.

Where a run begins and what is kept of it is `run.py`; one step is `steps.py`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.errors import ConfigError
from hflow_rt.evaluation.bits import bits_figures
from hflow_rt.evaluation.figures import Evaluation
from hflow_rt.evaluation.while_training import Distances
from hflow_rt.memory import guarded
from hflow_rt.models.family import LatentModel
from hflow_rt.runs import TENSORBOARD, taken
from hflow_rt.training.batches import Images, MicroBatches
from hflow_rt.training.config import RunConfig
from hflow_rt.training.log import Log, Meter, Progress
from hflow_rt.training.processes import Processes
from hflow_rt.training.run import Run
from hflow_rt.training.schedule import is_due
from hflow_rt.training.state import find_checkpoint
from hflow_rt.training.steps import Steps
from hflow_rt.training.stop import StopRequest

__all__ = ["TrainResult", "train"]

Samples = Callable[[LatentModel, int], NDArray[np.uint8] | None]
Draw = Callable[[LatentModel, int], Iterator[NDArray[np.uint8]]]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `initial` is the evaluation right after the data-dependent initialisation."""

    run: Path
    step: int
    images: int
    seconds: float
    images_per_second: float
    initial: Evaluation | None
    final: Evaluation | None
    stopped_by: Literal["images", "minutes", "interrupt"]


def train(
    config: RunConfig,
    data: Images,
    out: Path | str,
    *,
    resume: bool | Path = False,
    weights: Path | None = None,
    minutes: float | None = None,
    images: int | None = None,
    device: str = "auto",
    about_data: dict[str, Any] | None = None,
    on_samples: Samples | None = None,
    draw: Draw | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train into the run folder `out` until `images` have been seen, `minutes` have passed, or Ctrl-C.

    resume: go on from the run's last checkpoint, or from the checkpoint at this path.
    weights: a model file to start from instead of from random weights and their data-dependent initialisation.
    about_data: kept in run.json (where the images came from).
    on_samples: draws a picture `[H, W, 3]` from the averaged model after so many images, to be logged.
    draw: yields so many samples of it, always the same, in batches `[n, C, R, R]`; their distances from
    training images are measured where nothing else is.
    Raises `ConfigError`, `DataError`, `CheckpointError`, `BackendUnavailable` and `TrainingError`.
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"minutes must be > 0 and finite; found {minutes}")
    config = config if images is None else config.with_images(images)
    processes = Processes(device, config.training.precision)
    lower = "lower it, and raise training.accumulate to see as many images a step"
    with (
        contextlib.closing(processes),
        taken(Path(out)) if processes.is_main else contextlib.nullcontext(),
        guarded(f"at training.batch_size={config.training.batch_size}", f"{lower}; what was saved stays usable"),
    ):
        trainer = _Trainer(Run(config, data, Path(out), processes), on_samples, draw, on_progress)
        if resume is False:
            trainer.run.start(about_data or {}, weights)
            trainer.run.initial = trainer.evaluate()
        else:
            checkpoint = find_checkpoint(Path(out) if resume is True else resume)
            if checkpoint.resolve().parent.parent != Path(out).resolve():
                raise ConfigError(f"a run goes on in its own folder; {checkpoint} does not belong to {out}")
            trainer.run.resume(checkpoint, about_data or {})
        return trainer.train(minutes)


class _Trainer:
    def __init__(
        self,
        run: Run,
        on_samples: Samples | None,
        draw: Draw | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.run, self.training, self.processes = run, run.config.training, run.processes
        self.on_samples, self.draw, self.on_progress = on_samples, draw, on_progress
        self.batches = MicroBatches(run.plan, run.data, run.trained_on, self.training, self.processes)
        self.steps = Steps(run, self.batches)
        # Neighbours in the order of names look alike, so the evaluation takes every k-th.
        spread = np.linspace(0, max(len(run.held_out) - 1, 0), min(self.training.evaluate_images, len(run.held_out)))
        chosen = run.held_out[spread.round().astype(np.int64)]
        self.held_out, self.held_out_names = run.data.pixels(chosen), [run.data.names[index] for index in chosen]
        self.distances = Distances(self._trained_on, len(run.trained_on), self.processes.device)
        self.meter, self.since = Meter(), Meter()  # since the last line of the log, and since the last evaluation

    def train(self, minutes: float | None) -> TrainResult:
        """Step until the end and leave a checkpoint there."""
        run, started = self.run, time.monotonic()
        deadline = None if minutes is None else started + 60 * minutes
        log = Log(run.out / TENSORBOARD, run.place.images, self.processes.is_main)
        devices = [self.processes.device] if self.processes.device.type == "cuda" else []
        try:
            with StopRequest() as stop, torch.random.fork_rng(devices):  # steps seed the default generators
                if run.initial is not None and run.place.step == 0:
                    self._report(run.initial, log, deadline)
                stopped_by = self._loop(stop, deadline, log)
                run.save()  # nothing that follows may cost the weights
                if stopped_by != "interrupt":
                    if run.last is None or run.last.images < run.place.images:
                        self._report(self.evaluate(), log, deadline)
                    self._sample(log)
                    run.save()
        finally:
            self.batches.close()
            log.close()
        seconds = time.monotonic() - started
        step, images = run.place.step, run.place.images
        return TrainResult(run.out, step, images, seconds, self.meter.rate, run.initial, run.last, stopped_by)

    def _loop(self, stop: StopRequest, deadline: float | None, log: Log) -> Literal["images", "minutes", "interrupt"]:
        settings, run = self.training, self.run
        while run.place.images < settings.images:
            if self.processes.any(stop.asked):
                return "interrupt"
            if self.processes.any(deadline is not None and time.monotonic() >= deadline):
                return "minutes"
            started, before = time.monotonic(), run.place.images
            values = self.steps.take(stop)
            if values is None:
                return "interrupt"
            now = run.place.images
            for meter in (self.meter, self.since):
                meter.add(values, now - before, time.monotonic() - started)
            self._progress(deadline)
            if run.place.step % settings.log_every == 0:
                log.scalars({**self.meter.means(), "images_per_second": self.meter.recent_rate}, now)
                self.meter.reset()
            ended = now >= settings.images  # `train` does all of it once more at the end
            if is_due(settings.checkpoint_every_images, before, now) and not ended:
                run.save()
            if is_due(settings.evaluate_every_images, before, now) and not ended:
                self._report(self.evaluate(), log, deadline)
            if is_due(settings.sample_every_images, before, now) and not ended:
                self._sample(log)
        return "images"

    # -- what is done between steps, by the main process

    def evaluate(self) -> Evaluation:
        """Bounds and the plan's figures on the held-out images, or else distances of samples; the run's last ones."""
        run, settings = self.run, self.training
        if self.processes.is_main:
            with torch.no_grad():
                figures = run.plan.figures(run.average, self.held_out)
            if run.average.bounds() or figures or self.draw is None:
                found = bits_figures(
                    run.average,
                    self.held_out,
                    run.place.images,
                    settings.seed,
                    settings.evaluate_draws,
                    settings.batch_size,
                    self.held_out_names,
                )
            else:
                samples = self.draw(run.average, settings.evaluate_samples)
                found = self.distances.evaluate(samples, run.place.images)
            run.last = replace(found, figures={**found.figures, **figures})
        else:
            run.last = Evaluation(run.place.images, reason="only the main process evaluates")
        self.processes.wait()
        return run.last

    def _trained_on(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.run.data.pixels(self.run.trained_on[numbers])

    def _report(self, found: Evaluation, log: Log, deadline: float | None) -> None:
        log.evaluation(found)
        warning = self.run.plan.warning(self.since.means())
        if warning is not None:
            log.warning(warning, found.images)
        self._progress(deadline, found, warning)
        self.since.reset()

    def _sample(self, log: Log) -> None:
        images = self.run.place.images
        if self.processes.is_main and self.on_samples is not None:
            with torch.no_grad():
                picture = self.on_samples(self.run.average, images)
            if picture is not None:
                log.picture(picture, images)
        self.processes.wait()

    def _progress(
        self, deadline: float | None, evaluation: Evaluation | None = None, warning: str | None = None
    ) -> None:
        if not self.processes.is_main or self.on_progress is None:
            return
        place, means = self.run.place, self.meter.means()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self.meter.rate:
            by_images = max(0, place.total - place.images) / self.meter.rate
            left = by_images if left is None else min(left, by_images)
        self.on_progress(
            Progress(
                place.step,
                place.images,
                place.total,
                self.meter.rate,
                left,
                means.get("loss", float("nan")),
                means.get("bits_per_dim/train", float("nan")),
                evaluation,
                warning,
            )
        )
