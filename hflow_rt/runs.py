"""Where a training run keeps its files, and how the latest run is found. Needs no torch.

runs/NAME/run.json                     what `RunConfig` holds, and under "run" the data it saw
          model.safetensors            averaged weights, rewritten with every checkpoint
          checkpoints/000012800/       all that resuming needs, by images seen
          tensorboard/  samples/       for people
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hflow_rt.assets import resolved
from hflow_rt.errors import CheckpointError, DataError
from hflow_rt.files import destination, exists, is_file, is_folder, locked, removed_if_empty, unusable
from hflow_rt.manifest import MODEL
from hflow_rt.names import quoted

__all__ = [
    "CHECKPOINTS",
    "ROOT",
    "RUN",
    "SAMPLES",
    "TENSORBOARD",
    "checkpoints",
    "latest_run",
    "new_run",
    "read_run",
    "resolve_run",
    "taken",
]

ROOT = Path("runs")
RUN = "run.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
SAMPLES = "samples"
_LOCK = ".training"

_HOW = "train one with 'hflow-rt train' or see it all with 'hflow-rt demo'"


def new_run(name: str, root: Path | str = ROOT) -> Path:
    """A new, empty folder for a run, named by date and time: made here, so that no other run takes it.

    Raises `DataError` where it cannot be made.
    """
    stem = Path(root) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not is_folder(folder.parent):
                raise DataError(f"cannot make {folder}: {folder.parent} is a file; choose another --out") from None
        except OSError as error:
            raise unusable(folder, error, "make") from error
        else:
            break
    return folder


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made where there is none, for the training inside; one left empty goes again.

    Raises `CheckpointError` while another training holds it, and `DataError` where it cannot be made.
    """
    place = destination(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(folder, error, "make") from error
    with removed_if_empty(place), locked(place / _LOCK) as alone:
        if alone is False:
            raise CheckpointError(f"another training is using {folder}; wait until it ends, or choose another --out")
        yield


def latest_run(root: Path | str = ROOT) -> Path:
    """The run under `root` whose model was written last. Raises `CheckpointError` if there is none."""
    models = [path for path in Path(root).glob(f"*/{MODEL}") if not path.parent.name.startswith(".")]
    if not models:
        raise CheckpointError(f"no trained run under {root}/; {_HOW}")
    return max(models, key=lambda path: (path.stat().st_mtime_ns, path.parent.name)).parent


def resolve_run(path: Path | str | None = None) -> Path:
    """The run folder at `path`, a bundled model's by its name, or the latest run.

    Raises `CheckpointError` where no run with a model is.
    """
    if path is None:
        return latest_run()
    path = resolved(Path(path))
    if not exists(path):
        raise CheckpointError(f"no run at {path}; {_HOW}")
    if not is_file(path / MODEL):
        raise CheckpointError(f"{path} holds no {MODEL}, so it is no trained run; {_HOW}")
    return path


def checkpoints(run: Path | str) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in (Path(run) / CHECKPOINTS).glob("*") if path.name.isdigit() and is_folder(path)]
    return sorted(found, key=lambda path: int(path.name))


def read_run(run: Path | str) -> dict[str, Any]:
    """What `run.json` holds. Raises `CheckpointError`."""
    path = Path(run) / RUN
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if is_file(Path(run) / MODEL):
            raise CheckpointError(
                f"{run} has weights but no {RUN} and no checkpoint, so there is nothing to resume; "
                f"start a new run with 'hflow-rt train --from {quoted(run)}'"
            ) from error
        raise CheckpointError(f"{run} is no run: it has no {RUN}; {_HOW}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); copy it again or train again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold an object, not a {type(found).__name__}; copy it again or train again")
    return found
