"""Checkpoints: everything that resuming needs, in one folder that appears whole or not at all.

    checkpoints/000012800/state.safetensors   model/NAME, average/NAME, plan/NAME, optimizer/OPTIMIZER/SLOT/NAME
                          state.json          step, images, family, data, evaluations

The weights to go on from are the raw ones, to which the optimizers' moments belong; their average is beside. `plan`
is what the plan holds beside its model; moments have the plan's names, such as `model.levels.0.chain.weight`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hflow_rt.errors import CheckpointError, DataError, TrainingError
from hflow_rt.files import atomic_directory, exists, is_file, is_folder
from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.family import LatentModel
from hflow_rt.models.plan import TrainingPlan
from hflow_rt.names import quoted
from hflow_rt.runs import CHECKPOINTS, checkpoints

__all__ = ["find_checkpoint", "load_checkpoint", "prune", "read_about", "save_checkpoint", "set_later_aside"]

_TENSORS, _ABOUT = "state.safetensors", "state.json"

Optimizers = Mapping[str, torch.optim.Optimizer]


def save_checkpoint(
    run: Path,
    plan: TrainingPlan,
    average: LatentModel,
    optimizers: Optimizers,
    images: int,
    about: Mapping[str, Any],
) -> Path:
    """Write the checkpoint at `images` and return its folder.

    Raises `TrainingError` if a weight is not finite (nothing is written then) and `DataError` on a full disk.
    """
    tensors = {_stored(name): value for name, value in plan.state_dict().items()}
    tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
    for key, optimizer in optimizers.items():
        for name, parameter in _parameters(plan, optimizer):
            slots = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{key}/{slot}/{name}": value for slot, value in slots.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrainingError(
                f"weights must stay finite: {name.partition('/')[2]} is not after {images} images, so no "
                "checkpoint was written; resume the last one with lower training.learning_rates"
            )
    target = run / CHECKPOINTS / f"{images:09d}"
    with atomic_directory(target) as folder:
        try:
            save_file(tensors, folder / _TENSORS)
        except SafetensorError as error:
            raise DataError(f"cannot write {target}: {error}; free space or choose another place") from error
        (folder / _ABOUT).write_text(json.dumps(dict(about), indent=1, allow_nan=False) + "\n")
    return target


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the last one of the run at `path`. Raises `CheckpointError`."""
    if is_file(path / _ABOUT) or path.parent.name == CHECKPOINTS:
        return path
    found = checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint to resume; start again with 'hflow-rt train --out NEW'")
    return found[-1]


def read_about(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises `CheckpointError`."""
    try:
        about = json.loads((checkpoint / _ABOUT).read_bytes())
        for key in ("family", "step", "images", "data"):
            about[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_broken(checkpoint, _ABOUT, error)) from error
    return dict(about)


def load_checkpoint(checkpoint: Path, plan: TrainingPlan, average: LatentModel, optimizers: Optimizers) -> None:
    """Restore the plan, the average of its model and the optimizers' moments. Raises `CheckpointError`."""
    path = checkpoint / _TENSORS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_broken(checkpoint, _TENSORS, error)) from error
    state = {f"model.{name}": value for name, value in _part(tensors, "model/").items()}
    load_state(plan, state | _part(tensors, "plan/"), str(path))
    load_state(average, _part(tensors, "average/"), str(path))
    # of runs begun when there was one optimizer, of a model
    former = _part(tensors, "adam/").items()
    moments = {
        f"{next(iter(optimizers))}/{slot}/model.{name}": v for key, v in former for slot, name in [key.split("/")]
    }
    moments |= _part(tensors, "optimizer/")
    for key, optimizer in optimizers.items():
        _load_moments(_part(moments, f"{key}/"), plan, optimizer, f"{path}: optimizer/{key}")


def _load_moments(
    tensors: Mapping[str, Tensor], plan: TrainingPlan, optimizer: torch.optim.Optimizer, source: str
) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        found.setdefault(name, {})[slot] = value
    state = {}
    for index, (name, parameter) in enumerate(_parameters(plan, optimizer)):
        slots = found.get(name, {})
        for slot, value in slots.items():
            if slot == "step":
                continue
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{source}/{slot}/{name} is {list(value.shape)} and must be {list(parameter.shape)}"
                )
            # the fused optimizer walks memory, so a moment must lie as its parameter does (channels last or not)
            slots[slot] = torch.empty_like(parameter, requires_grad=False).copy_(value)
        if slots:
            state[index] = slots
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(plan: TrainingPlan, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimizer's parameters in its order, by their names in the plan."""
    names = {parameter: name for name, parameter in plan.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[parameter], parameter


def _stored(name: str) -> str:
    """What a tensor of the plan is called in a checkpoint."""
    model = name.startswith("model.")
    return f"model/{name.removeprefix('model.')}" if model else f"plan/{name}"


def prune(run: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints."""
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def set_later_aside(run: Path, images: int) -> list[Path]:
    """Rename the checkpoints after `images`, which a run resumed there will not pass through; the new paths.

    They are kept, but no longer count as the run's last.
    """
    moved = []
    for later in checkpoints(run):
        if int(later.name) > images:
            target = later.with_name(f"aside-{later.name}")
            number = 1
            while exists(target):
                number += 1
                target = later.with_name(f"aside-{later.name}-{number}")
            moved.append(later.rename(target))
    return moved


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _broken(checkpoint: Path, file: str, error: Exception) -> str:
    """One line: which file, and the checkpoint before it if there is one."""
    if not is_folder(checkpoint):
        return f"no checkpoint at {checkpoint}; name a run or one of its {CHECKPOINTS}/ folders"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    before = [path for path in checkpoints(checkpoint.parent.parent) if path.name < checkpoint.name]
    remedy = f"go on from the one before with --resume {quoted(before[-1])}" if before else "train again"
    return f"{checkpoint / file} is not a whole checkpoint ({reason}); {remedy}"
