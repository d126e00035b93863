"""A run in memory: what trains and where it stands, how it begins, and how it gets to disk and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import hflow_rt
from hflow_rt.errors import CheckpointError, DataError, TrainingError
from hflow_rt.evaluation.figures import Evaluation
from hflow_rt.files import atomic_file, exists, sha256
from hflow_rt.manifest import MODEL
from hflow_rt.models.checkpoint import build_model, load_state, read_metadata, read_state, save_model
from hflow_rt.models.plan import Place
from hflow_rt.names import quoted
from hflow_rt.runs import RUN, checkpoints, read_run
from hflow_rt.streams import generator
from hflow_rt.training.batches import Images, Shuffle
from hflow_rt.training.config import RunConfig
from hflow_rt.training.ema import averaged_copy, update_average
from hflow_rt.training.footprint import check_batch, check_model
from hflow_rt.training.optimizers import build_optimizers, trained_groups
from hflow_rt.training.processes import Processes
from hflow_rt.training.state import load_checkpoint, prune, read_about, save_checkpoint, set_later_aside

__all__ = ["Run"]


class Run:
    """The plan, the average of its model, its optimizers by name, and the place.

    trained_on, held_out: indices into `data`. initial, last: evaluations. started_from: the weights it began with.
    """

    def __init__(self, config: RunConfig, data: Images, out: Path, processes: Processes) -> None:
        self.config, self.data, self.out, self.processes = config, data, out, processes
        training = config.training
        self.trained_on, self.held_out = data.split()
        if len(self.trained_on) < 2:
            count = f"{len(self.trained_on)} of {len(data)}"
            raise TrainingError(f"training needs at least 2 images that are not held out; found {count}; add images")

        check_model(config, processes.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.plan = build_model(config.family, config.model).plan(training)
        model = self.plan.model
        needed, found = (model.channels, model.resolution, model.resolution), data.pixels(self.trained_on[:1]).shape[1:]
        if found != needed:
            raise DataError(f"the model needs images {list(needed)}; found {list(found)}; open them as such")
        self.plan.to(processes.device).train()
        if processes.device.type == "cpu":
            # oneDNN then skips reordering: 1.12 to 1.15 times the steps of the demo preset; not measured on CUDA
            self.plan.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        check_batch(self.plan, data, self.trained_on, training, processes.accelerator.autocast)
        self.average = averaged_copy(self.plan.model)
        self.optimizers = build_optimizers(training, trained_groups(config, self.plan), processes.device)

        self.place = Place(total=training.images)
        self.initial: Evaluation | None = None
        self.last: Evaluation | None = None
        self.started_from: dict[str, str] | None = None

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
            self._write_settings(about_data)
        if weights is None:
            self._initialize()
        # rounding may differ between unlike devices; from here on every process holds the same weights
        self.processes.average([*self.plan.parameters(), *self.plan.buffers()])
        update_average(self.average, self.plan.model, 1)

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
        if about["images"] >= self.place.total:
            seen = f"{about['images']} of {self.place.total} images"
            raise TrainingError(f"{self.out} has already seen {seen}; ask for more with --images")
        load_checkpoint(checkpoint, self.plan, self.average, self.optimizers)
        self.place = Place(about["step"], about["images"], self.place.total)
        self.initial = Evaluation.load(about["initial"]) if about.get("initial") else None
        self.last = Evaluation.load(about["last"]) if about.get("last") else None
        if about.get("scaler") and self.processes.accelerator.scaler is not None:
            self.processes.accelerator.scaler.load_state_dict(about["scaler"])
        self.started_from = about.get("from")
        if self.processes.is_main:
            set_later_aside(self.out, self.place.images)
            self._write_settings(about_data)
        self.processes.wait()

    def save(self) -> None:
        """Write the checkpoint, then the averaged model that everything else reads."""
        if self.processes.is_main:
            scaler = self.processes.accelerator.scaler
            evaluated = {
                "initial": None if self.initial is None else self.initial.dump(),
                "last": None if self.last is None else self.last.dump(),
            }
            place = {"step": self.place.step, "images": self.place.images}
            origin: dict[str, Any] = {"data": self.data.hash, "version": hflow_rt.__version__}
            if self.started_from is not None:
                origin["from"] = self.started_from
            about = {"family": self.config.family, **place, **evaluated, **origin}
            if scaler is not None:
                about["scaler"] = scaler.state_dict()
            save_checkpoint(self.out, self.plan, self.average, self.optimizers, self.place.images, about)
            extra = {"preset": self.config.preset, **place, "evaluation": evaluated, **origin}
            save_model(self.out / MODEL, self.config.family, self.average, self.average.state_dict(), extra)
            prune(self.out, self.config.training.keep_last)
        self.processes.wait()

    def _load(self, weights: Path) -> None:
        """Begin with the weights of another model of this family and shape."""
        family = read_metadata(weights)["family"]
        if family != self.config.family:
            raise CheckpointError(f"{weights} holds a model of family '{family}', not '{self.config.family}'")
        load_state(self.plan.model, read_state(weights), str(weights))
        self.started_from = {"name": str(weights), "sha256": sha256(weights)}

    def _initialize(self) -> None:
        training = self.config.training
        # the first images of the first epoch, but no image twice
        count = min(training.init_images, len(self.trained_on))
        first = torch.from_numpy(self.data.pixels(Shuffle(self.trained_on, training.seed).take(0, count)))
        with torch.no_grad():
            self.plan.start(first.to(self.processes.device), generator(training.seed, count))

    def _write_settings(self, about_data: dict[str, Any]) -> None:
        about = {
            "data": {**about_data, "images": len(self.data), "hash": self.data.hash},
            "version": hflow_rt.__version__,
            **({} if self.started_from is None else {"from": self.started_from}),
        }
        with atomic_file(self.out / RUN) as temporary:
            temporary.write_text(json.dumps({**self.config.dump(), "run": about}, indent=1) + "\n")
