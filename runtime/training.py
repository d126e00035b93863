"""`hflow_rt.train`, and the pictures of samples that are drawn on the way: training with a runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hflow_rt.extras import need_extra
from hflow_rt.files import removed_if_empty
from hflow_rt.runs import SAMPLES
from hflow_rt.runtime.images.pictures import labelled_rows, save_image, to_uint8
from hflow_rt.runtime.in_memory import session_of
from hflow_rt.training.prepare import Settings, Start, prepare

if TYPE_CHECKING:
    from hflow_rt.models.family import LatentModel
    from hflow_rt.training.log import Progress
    from hflow_rt.training.trainer import Samples, TrainResult

__all__ = ["samples", "samples_into", "train"]

# The std of each row of the sample grid: the whole prior, then the range where samples look best.
_STDS = (1.0, 0.8, 0.64, 0.4, 0.24)
_SAMPLES_A_ROW = 8
_BATCH = 32


def train(
    preset: str | None = None,
    data: Path | str | None = None,
    out: Path | str | None = None,
    *,
    config: Settings = None,
    settings: Sequence[str] = (),
    start: Start = None,
    resume: bool | Path | str = False,
    minutes: float | None = None,
    images: int | None = None,
    device: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a model, by default the small one on the bundled images, and return how that ended; `.run` is its folder.

    preset: named settings, by default the small model's. config: a file or dict of settings, alone or on top of the
    preset. settings: single changes such as `training.batch_size=8`. data: a folder, archive or array of images. out:
    the run's folder, by default runs/PRESET-DATE-TIME. start: a run, bundle or model file whose weights to start from.
    resume: a run to go on with, or one of its checkpoints; True for the latest run. minutes, images: when to stop, as
    Ctrl-C does; by default when the preset says. on_progress: hears of every step. Raises `ConfigError`, `DataError`,
    `CheckpointError`, `TrainingError`, `OutOfMemory` and `BackendUnavailable`; warns of images that cannot be used.

    >>> import hflow_rt
    >>> result = hflow_rt.train(data="photos", out="runs/x", minutes=5)
    >>> result.run.as_posix()
    'runs/x'
    """
    need_extra("train", "torch", "accelerate", "tensorboard", what="training")
    prepared = prepare(preset, data, out, config=config, settings=settings, start=start, resume=resume)
    for line in filter(None, (prepared.unused, prepared.other_split)):
        warnings.warn(line, stacklevel=2)
    with removed_if_empty(prepared.folder):
        on_samples = samples_into(prepared.folder)
        return prepared.train(
            minutes=minutes,
            images=images,
            device=device,
            on_samples=on_samples,
            draw=samples,
            on_progress=on_progress,
        )


def samples_into(folder: Path) -> Samples:
    """Draws `samples/IMAGES.png` in a run's folder: a row for each std that there is, the same noise every time."""

    def draw(model: LatentModel, images: int) -> NDArray[np.uint8]:
        session = session_of(model)
        rows = []
        for std in _STDS if session.drawing.scaled else (None,):
            (latents,) = session.draw(range(_SAMPLES_A_ROW), std)
            rows.append(("samples" if std is None else f"{std:g}", to_uint8(np.nan_to_num(session.forward(latents)))))
        picture = labelled_rows(rows)
        save_image(folder / SAMPLES / f"{images:09d}.png", picture)
        return np.asarray(picture.convert("RGB"))

    return draw


def samples(model: LatentModel, count: int) -> Iterator[NDArray[np.uint8]]:
    """The images 0 .. count - 1 of seed 0, in batches `[n, C, R, R]`, as the model is exported."""
    from hflow_rt.evaluation.session import sample_pixels

    session = session_of(model)
    for start in range(0, count, _BATCH):
        yield sample_pixels(session, range(start, min(start + _BATCH, count)), None, 0)
