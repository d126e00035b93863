"""The training loop: accumulated Adam steps with clipping and a weight average, resumable to the bit.

A step is a function of the weights, the optimizer's moments and the place in the run (`batches.py`) alone, so
a run that is stopped and resumed is the run that was never stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hflow_rt
from hflow_rt.draws import generator
from hflow_rt.errors import CheckpointError, ConfigError, DataError, TrainingError
from hflow_rt.evaluation.bits import Evaluation, evaluate
from hflow_rt.files import atomic_file, exists, sha256
from hflow_rt.manifest import MODEL
from hflow_rt.memory import guarded
from hflow_rt.models.checkpoint import build_model, load_state, read_metadata, read_state, save_model
from hflow_rt.models.family import LatentModel, LossTerms
from hflow_rt.names import quoted
from hflow_rt.runs import RUN, TENSORBOARD, checkpoints, read_run, taken
from hflow_rt.training.batches import Images, MicroBatches, Place, Shuffle
from hflow_rt.training.config import RunConfig
from hflow_rt.training.ema import averaged_copy, update_average
from hflow_rt.training.finite import TERM, broken_values, diverged
from hflow_rt.training.footprint import check_batch, check_model
from hflow_rt.training.groups import trained_groups
from hflow_rt.training.log import Log, Meter, Progress
from hflow_rt.training.processes import Processes
from hflow_rt.training.schedule import is_due, learning_rates
from hflow_rt.training.state import (
    find_checkpoint,
    load_checkpoint,
    prune,
    read_about,
    save_checkpoint,
    set_later_aside,
)
from hflow_rt.training.stop import StopRequest

__all__ = ["TrainResult", "train"]

Samples = Callable[[LatentModel, int], NDArray[np.uint8] | None]

# fp16: so many steps in a row may overflow while the loss scale looks for its level (it halves each time).
_OVERFLOWS = 24


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
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train into the run folder `out` until `images` have been seen, `minutes` have passed, or Ctrl-C.

    resume: go on from the run's last checkpoint, or from the checkpoint at this path.
    weights: a model file to start from instead of from random weights and their data-dependent initialisation.
    about_data: kept in run.json (where the images came from).
    on_samples: draws a picture `[H, W, 3]` from the averaged model after so many images, to be logged.
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
        trainer = _Trainer(config, data, Path(out), processes, on_samples, on_progress)
        if resume is False:
            trainer.start(about_data or {}, weights)
        else:
            checkpoint = find_checkpoint(Path(out) if resume is True else resume)
            if checkpoint.resolve().parent.parent != Path(out).resolve():
                raise ConfigError(f"a run goes on in its own folder; {checkpoint} does not belong to {out}")
            trainer.resume(checkpoint, about_data or {})
        return trainer.run(minutes)


class _Trainer:
    def __init__(
        self,
        config: RunConfig,
        data: Images,
        out: Path,
        processes: Processes,
        on_samples: Samples | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.training = config, config.training
        self.data, self.out, self.processes = data, out, processes
        self.on_samples, self.on_progress = on_samples, on_progress
        self.trained_on, held_out = data.split()
        if len(self.trained_on) < 2:
            count = f"{len(self.trained_on)} of {len(data)}"
            raise TrainingError(f"training needs at least 2 images that are not held out; found {count}; add images")

        check_model(config, processes.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            self.model = build_model(config.family, config.model)
        needed = (self.model.channels, self.model.resolution, self.model.resolution)
        found = data.pixels(self.trained_on[:1]).shape[1:]
        if found != needed:
            raise DataError(f"the model needs images {list(needed)}; found {list(found)}; open them as such")
        self.model.to(processes.device).train()
        if processes.device.type == "cpu":
            # oneDNN then skips reordering: 1.12 to 1.15 times the steps of hflow-demo; not measured on CUDA
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        check_batch(self.model, data, self.trained_on, self.training, processes.accelerator.autocast)
        self.average = averaged_copy(self.model)

        groups = trained_groups(config, self.model)
        self.parameters = [parameter for group in groups.values() for parameter in group]
        named = [{"params": parameters, "name": name} for name, parameters in groups.items()]
        self.adam: torch.optim.Optimizer
        if self.training.optimizer == "adamax":
            self.adam = torch.optim.Adamax(named, betas=self.training.betas)
        else:
            fused = processes.device.type in ("cpu", "cuda")
            self.adam = torch.optim.Adam(named, betas=self.training.betas, fused=fused)
        self.optimizer = processes.accelerator.prepare_optimizer(self.adam, device_placement=False)

        self.batches = MicroBatches(self.model, data, self.trained_on, self.training, processes)
        # Neighbours in the order of names look alike, so the evaluation takes every k-th.
        spread = np.linspace(0, max(len(held_out) - 1, 0), min(self.training.evaluate_images, len(held_out)))
        chosen = held_out[spread.round().astype(np.int64)]
        self.held_out, self.held_out_names = data.pixels(chosen), [data.names[index] for index in chosen]

        self.place = Place()
        self.meter = Meter()
        self.overflows = 0
        self.initial: Evaluation | None = None
        self.last: Evaluation | None = None
        self.started_from: dict[str, str] | None = None

    # -- where a run begins

    def start(self, about_data: dict[str, Any], weights: Path | None) -> None:
        """Begin a new run; one that exists is never touched."""
        if weights is not None:
            self._load(weights)
        if self.processes.is_main:
            if checkpoints(self.out) or exists(self.out / MODEL):
                raise CheckpointError(
                    f"{self.out} already holds a run; go on with --resume {quoted(self.out)}, or choose another --out"
                )
            if exists(self.out / RUN) and "family" not in read_run(self.out):
                raise CheckpointError(f"{self.out / RUN} is not of a run of hflow-rt; choose another --out")
            self._write_run(about_data)
        if weights is None:
            self._initialize()
        # rounding may differ between unlike devices; from here on every process holds the same weights
        self.processes.average([*self.model.parameters(), *self.model.buffers()])
        update_average(self.average, self.model, 1)
        self.initial = self._evaluate()

    def _load(self, weights: Path) -> None:
        """Begin with the weights of another model of this family and shape."""
        family = read_metadata(weights)["family"]
        if family != self.config.family:
            raise CheckpointError(f"{weights} holds a model of family '{family}', not '{self.config.family}'")
        load_state(self.model, read_state(weights), str(weights))
        self.started_from = {"name": str(weights), "sha256": sha256(weights)}

    def _initialize(self) -> None:
        seed = self.training.seed
        # the first images of the first epoch, but no image twice
        count = min(self.training.init_images, len(self.trained_on))
        first = torch.from_numpy(self.data.pixels(Shuffle(self.trained_on, seed).take(0, count)))
        with torch.no_grad():
            self.model.initialize(first.to(self.processes.device), generator(seed, count))

    def resume(self, checkpoint: Path, about_data: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same model and the same images."""
        about = read_about(checkpoint)
        if about["family"] != self.config.family:
            raise CheckpointError(
                f"{checkpoint} holds a model of family '{about['family']}', not '{self.config.family}'; "
                "resume with its own settings"
            )
        if about["data"] != self.data.hash:
            raise DataError(
                f"{checkpoint} was trained on other images (hash {str(about['data'])[:12]}, "
                f"here {self.data.hash[:12]}); give the same --data, or start a new run"
            )
        if about["images"] >= self.training.images:
            seen = f"{about['images']} of {self.training.images} images"
            raise TrainingError(f"{self.out} has already seen {seen}; ask for more with --images")
        load_checkpoint(checkpoint, self.model, self.average, self.adam)
        self.place = Place(about["step"], about["images"])
        self.initial = Evaluation.load(about["initial"]) if about.get("initial") else None
        self.last = Evaluation.load(about["last"]) if about.get("last") else None
        if about.get("scaler") and self.processes.accelerator.scaler is not None:
            self.processes.accelerator.scaler.load_state_dict(about["scaler"])
        self.started_from = about.get("from")
        if self.processes.is_main:
            set_later_aside(self.out, self.place.images)
            self._write_run(about_data)
        self.processes.wait()

    def _write_run(self, about_data: dict[str, Any]) -> None:
        about = {
            "data": {**about_data, "images": len(self.data), "hash": self.data.hash},
            "version": hflow_rt.__version__,
            **({} if self.started_from is None else {"from": self.started_from}),
        }
        with atomic_file(self.out / RUN) as temporary:
            temporary.write_text(json.dumps({**self.config.dump(), "run": about}, indent=1) + "\n")

    # -- the loop

    def run(self, minutes: float | None) -> TrainResult:
        """Step until the end and leave a checkpoint there."""
        started = time.monotonic()
        deadline = None if minutes is None else started + 60 * minutes
        log = Log(self.out / TENSORBOARD, self.place.images, self.processes.is_main)
        try:
            with StopRequest() as stop:
                if self.initial is not None and self.place.step == 0:
                    self._report(self.initial, log, deadline)
                stopped_by = self._loop(stop, deadline, log)
                self._save()  # nothing that follows may cost the weights
                if stopped_by != "interrupt":
                    if self.last is None or self.last.images < self.place.images:
                        self._report(self._evaluate(), log, deadline)
                    self._sample(log)
                    self._save()
        finally:
            self.batches.close()
            log.close()
        seconds = time.monotonic() - started
        return TrainResult(
            self.out,
            self.place.step,
            self.place.images,
            seconds,
            self.meter.rate,
            self.initial,
            self.last,
            stopped_by,
        )

    def _loop(self, stop: StopRequest, deadline: float | None, log: Log) -> Literal["images", "minutes", "interrupt"]:
        settings = self.training
        while self.place.images < settings.images:
            if self.processes.any(stop.asked):
                return "interrupt"
            if self.processes.any(deadline is not None and time.monotonic() >= deadline):
                return "minutes"
            started, before = time.monotonic(), self.place.images
            values = self._step(stop)
            if values is None:
                return "interrupt"
            now = self.place.images
            self.meter.add(values, now - before, time.monotonic() - started)
            self._progress(deadline)
            if self.place.step % settings.log_every == 0:
                log.scalars({**self.meter.means(), "images_per_second": self.meter.recent_rate}, now)
                self.meter.reset()
            ended = now >= settings.images  # `run` does all of it once more at the end
            if is_due(settings.checkpoint_every_images, before, now) and not ended:
                self._save()
            if is_due(settings.evaluate_every_images, before, now) and not ended:
                self._report(self._evaluate(), log, deadline)
            if is_due(settings.sample_every_images, before, now) and not ended:
                self._sample(log)
        return "images"

    def _step(self, stop: StopRequest) -> dict[str, float] | None:
        """One optimizer step; values for the log by tag, or None if stopped between micro-batches.

        What such a half step has accumulated is dropped: the resumed run takes the whole step again.
        """
        settings, accelerator = self.training, self.processes.accelerator
        rates = learning_rates(settings, self.place.images)
        for group in self.adam.param_groups:
            group["lr"] = rates[group["name"]]
        self.optimizer.zero_grad()
        tags: list[str] = []
        sums: Tensor | None = None
        for micro in range(settings.accumulate):
            batch = self.batches.get(self.place, micro)
            with accelerator.autocast():
                found = self.model.loss(batch.images, batch.noise, batch.conditions)
            accelerator.backward(found.loss / settings.accumulate)  # type: ignore[no-untyped-call]
            tags, values = _values(found)
            sums = values if sums is None else sums + values
            # several processes must not part ways here; they stop together between steps
            if stop.asked and self.processes.count == 1 and micro + 1 < settings.accumulate:
                self._undo_buffers()
                return None
        assert sums is not None
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.processes.average([*gradients, *self.model.buffers()])
        accelerator.unscale_gradients(self.optimizer)  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm(gradients)
        # the one place a step waits for the device
        numbers = torch.cat([sums / settings.accumulate, norm.float().reshape(1)]).tolist()
        logged = dict(zip([*tags, "gradient_norm"], numbers, strict=True))
        self._check_finite(logged)
        nn.utils.clip_grads_with_norm_(self.parameters, settings.grad_clip, norm)
        self.optimizer.step()
        self.place = Place(self.place.step + 1, self.place.images + self.batches.step_images)
        copies = self.place.images <= settings.ema_warmup_images
        update_average(self.average, self.model, 1.0 if copies else settings.ema_weight)
        return logged | {f"learning_rate/{name}": rate for name, rate in rates.items()}

    def _undo_buffers(self) -> None:
        """Take back what the losses of a half step did to running statistics; the average has the former."""
        for buffer, former in zip(self.model.buffers(), self.average.buffers(), strict=True):
            buffer.copy_(former)

    def _check_finite(self, logged: dict[str, float]) -> None:
        """Stop before a step that would spoil the weights. Raises `TrainingError`."""
        broken = broken_values(logged)
        only_gradient = len(broken) == 1 and not np.isfinite(logged["gradient_norm"])
        self.overflows = self.overflows + 1 if broken else 0
        if not broken:
            return
        if only_gradient and self.processes.accelerator.scaler is not None and self.overflows < _OVERFLOWS:
            return  # the scaler skips this step and tries a smaller scale
        last = checkpoints(self.out)[-1:]
        named = self.model.named_parameters()
        raise diverged(broken, named, self.place, self.training, last[0] if last else None)

    # -- what is done between steps, by the main process

    def _evaluate(self) -> Evaluation:
        if self.processes.is_main:
            self.last = evaluate(
                self.average,
                self.held_out,
                self.place.images,
                self.training.seed,
                self.training.evaluate_draws,
                self.training.batch_size,
                self.held_out_names,
            )
        else:
            self.last = Evaluation(self.place.images, None, None, "only the main process evaluates")
        self.processes.wait()
        return self.last

    def _report(self, found: Evaluation, log: Log, deadline: float | None) -> None:
        log.evaluation(found)
        self._progress(deadline, found)

    def _sample(self, log: Log) -> None:
        if self.processes.is_main and self.on_samples is not None:
            with torch.no_grad():
                picture = self.on_samples(self.average, self.place.images)
            if picture is not None:
                log.picture(picture, self.place.images)
        self.processes.wait()

    def _progress(self, deadline: float | None, evaluation: Evaluation | None = None) -> None:
        if not self.processes.is_main or self.on_progress is None:
            return
        means = self.meter.means()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self.meter.rate:
            by_images = max(0, self.training.images - self.place.images) / self.meter.rate
            left = by_images if left is None else min(left, by_images)
        self.on_progress(
            Progress(
                self.place.step,
                self.place.images,
                self.training.images,
                self.meter.rate,
                left,
                means.get("loss", float("nan")),
                means.get("bits_per_dim/train", float("nan")),
                evaluation,
            )
        )

    def _save(self) -> None:
        """Write the checkpoint, then the averaged model that everything else reads."""
        if self.processes.is_main:
            scaler = self.processes.accelerator.scaler
            initial = None if self.initial is None else self.initial.dump()
            last = None if self.last is None else self.last.dump()
            place = {"step": self.place.step, "images": self.place.images}
            bits = {"initial": initial, "last": last}
            about = {
                "family": self.config.family,
                **place,
                "data": self.data.hash,
                **bits,
                "version": hflow_rt.__version__,
            }
            if scaler is not None:
                about["scaler"] = scaler.state_dict()
            if self.started_from is not None:
                about["from"] = self.started_from
            save_checkpoint(self.out, self.model, self.average, self.adam, self.place.images, about)
            extra = {
                "preset": self.config.preset,
                **place,
                "bits_per_dim": bits,
                "data": self.data.hash,
                "version": hflow_rt.__version__,
                **({} if self.started_from is None else {"from": self.started_from}),
            }
            save_model(self.out / MODEL, self.config.family, self.average, self.average.state_dict(), extra)
            prune(self.out, self.training.keep_last)
        self.processes.wait()


def _values(found: LossTerms) -> tuple[list[str], Tensor]:
    """Tags and float32 values of a loss for the log, still on the device."""
    named = {"loss": found.loss}
    if found.bits_per_dim is not None:
        named["bits_per_dim/train"] = found.bits_per_dim
    named |= {f"{TERM}{name}": value for name, value in found.terms.items()}
    return list(named), torch.stack([value.detach().float() for value in named.values()])
