"""Where a training run keeps its files, and how the latest run is found. Needs no torch.

runs/NAME/run.json                     what `RunConfig` holds, and under "run" the data it saw
          model.safetensors            averaged weights, rewritten with every checkpoint
          checkpoints/000012800/       all that resuming needs, by images seen
          tensorboard/  samples/       for people
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hflow_rt.errors import CheckpointError
from hflow_rt.manifest import MODEL

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
]

ROOT = Path("runs")
RUN = "run.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
SAMPLES = "samples"

_HOW = "train one with 'hflow-rt train' or see it all with 'hflow-rt demo'"


def new_run(name: str, root: Path | str = ROOT) -> Path:
    """A folder name for a new run, by date and time; nothing is written."""
    return Path(root) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def latest_run(root: Path | str = ROOT) -> Path:
    """The run under `root` whose model was written last. Raises `CheckpointError` if there is none."""
    models = [path for path in Path(root).glob(f"*/{MODEL}") if not path.parent.name.startswith(".")]
    if not models:
        raise CheckpointError(f"no trained run under {root}/; {_HOW}")
    return max(models, key=lambda path: (path.stat().st_mtime_ns, path.parent.name)).parent


def resolve_run(path: Path | str | None = None) -> Path:
    """The run folder at `path`, or the latest run. Raises `CheckpointError` where no run with a model is."""
    if path is None:
        return latest_run()
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no run at {path}; {_HOW}")
    if not (path / MODEL).is_file():
        raise CheckpointError(f"{path} holds no {MODEL}, so it is no trained run; {_HOW}")
    return path


def checkpoints(run: Path | str) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in (Path(run) / CHECKPOINTS).glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def read_run(run: Path | str) -> dict[str, Any]:
    """What `run.json` holds. Raises `CheckpointError`."""
    path = Path(run) / RUN
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if (Path(run) / MODEL).is_file():
            raise CheckpointError(
                f"{run} has weights but no {RUN} and no checkpoint, so there is nothing to resume; "
                f"start a new run with 'hflow-rt train --from {run}'"
            ) from error
        raise CheckpointError(f"{run} is no run: it has no {RUN}; {_HOW}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); copy it again or train again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold an object, not a {type(found).__name__}; copy it again or train again")
    return found
