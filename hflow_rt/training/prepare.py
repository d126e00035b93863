"""Before the first step of a training: settings and images are found, what a run that goes on keeps, and a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hflow_rt.assets import demo_images, resolved
from hflow_rt.errors import ConfigError
from hflow_rt.files import is_file, is_folder
from hflow_rt.manifest import MODEL
from hflow_rt.runs import CHECKPOINTS, ROOT, RUN, latest_run, new_run, read_run

if TYPE_CHECKING:
    from hflow_rt.data.dataset import ImageSet
    from hflow_rt.training.config import RunConfig
    from hflow_rt.training.log import Progress
    from hflow_rt.training.trainer import Draw, Samples, TrainResult

__all__ = ["Settings", "Start", "Training", "is_main", "prepare"]

Start = Path | str | None
Settings = Path | str | Mapping[str, Any] | None


@dataclass(frozen=True)
class Training:
    """A training that can begin: all that was found and decided. Its folder is made, and empty or a run's."""

    config: RunConfig
    images: ImageSet
    folder: Path
    about: dict[str, Any]  # where the images come from and how they are split, for run.json
    checkpoint: bool | Path = False  # to go on from
    weights: Path | None = None
    unused: str | None = None  # a line about images that cannot be used
    other_split: str | None = None  # a line if a run that goes on began with other images held out

    def train(
        self,
        *,
        minutes: float | None = None,
        images: int | None = None,
        device: str = "auto",
        on_samples: Samples | None = None,
        draw: Draw | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> TrainResult:
        """As the function `train` of the trainer; the folder may be left empty where that fails."""
        from hflow_rt.training.trainer import train as run_training

        return run_training(
            self.config,
            self.images,
            self.folder,
            resume=self.checkpoint,
            weights=self.weights,
            minutes=minutes,
            images=images,
            device=device,
            about_data=self.about,
            on_samples=on_samples,
            draw=draw,
            on_progress=on_progress,
        )


def prepare(
    preset: str | None = None,
    data: Path | str | None = None,
    out: Path | str | None = None,
    *,
    config: Settings = None,
    settings: Sequence[str] = (),
    start: Start = None,
    resume: bool | Path | str = False,
) -> Training:
    """Everything of `train` before the first step."""
    from hflow_rt.data.dataset import open_dataset
    from hflow_rt.models.registry import DEFAULT_PRESET
    from hflow_rt.training.config import load_config

    about: dict[str, Any] = {"source": None if data is None else os.path.abspath(data)}
    before: dict[str, Any] | None = None  # the run's data
    checkpoint: bool | Path = False
    folder = None if out is None else Path(out)
    begin = None if start is None else resolved(Path(start))
    if resume is not False:
        if preset is not None or config is not None or start is not None:
            raise ConfigError("--resume takes weights and settings from the run; change single ones with --set")
        folder, checkpoint, values = _resumed(None if resume is True else Path(resume), folder)
        chosen = load_config(file=values, overrides=settings)
        before = values.get("run", {}).get("data", {})
        if data is None:
            about = {"source": before.get("source")}
    elif begin is not None and preset is None and config is None:
        if not is_file(begin / RUN):
            raise ConfigError(f"{start} holds no settings of a training run; name some with --preset or --config")
        chosen = load_config(file=read_run(begin), overrides=settings)
    else:
        chosen = load_config(preset or (DEFAULT_PRESET if config is None else None), config, settings)
    weights = None if begin is None else begin / MODEL if is_folder(begin) else begin
    source = about["source"]
    where = demo_images() if source is None else Path(source)
    opened = open_dataset(where, chosen.resolution, channels=chosen.channels)
    about["split"] = opened.split_by
    unused = None
    if opened.skipped and source is not None:
        counts = ", ".join(f"{count} {reason}" for reason, count in opened.skipped.items())
        unused = f"{len(opened)} images; not used: {counts}"
    other_split = None if before is None else _other_split(before.get("split"), opened)
    if folder is None:
        name = chosen.preset or chosen.family
        folder = new_run(name) if is_main() else ROOT / name  # the main process writes
    return Training(chosen, opened, folder, about, checkpoint, weights, unused, other_split)


def is_main() -> bool:
    """Whether this is the process that reports, among those `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _resumed(run: Path | None, out: Path | None) -> tuple[Path, bool | Path, dict[str, Any]]:
    """Folder, checkpoint and settings of what `--resume [RUN] [--out RUN]` names."""
    named = run or out or latest_run()
    is_checkpoint = named.resolve().parent.name == CHECKPOINTS
    folder = named.parent.parent if is_checkpoint else named
    if out is not None and out.resolve() != folder.resolve():
        raise ConfigError(f"a run goes on in its own folder {folder}, not in --out {out}; omit --out")
    return folder, named if is_checkpoint else True, read_run(folder)


def _other_split(before: str | None, images: ImageSet) -> str | None:
    """A line if the images were split otherwise `before`. Versions that recorded nothing split otherwise."""
    known = all(name.partition("/")[0] in ("train", "test", "val") for name in images.names)
    if before is None and not known and "by the folders" in images.split_by:
        before = "a hash of the names"
    if before in (None, images.split_by):
        return None
    return (
        f"the run began with images split by {before}, so it has seen some that are now held out; "
        "their bits/dim mean less than those of a new run"
    )
