"""Model files: one safetensors file holds the weights and, in its metadata, everything needed to rebuild the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.files import atomic_file, is_file
from hflow_rt.models.registry import ModelConfig, Settings, View, family

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hflow_rt.models.family import LatentModel

__all__ = [
    "METADATA_KEY",
    "build_model",
    "check_state",
    "load_model",
    "load_state",
    "parse_config",
    "read_metadata",
    "read_state",
    "save_model",
    "seen_at",
    "skeleton",
]

METADATA_KEY = "hflow_rt"
_S = TypeVar("_S", bound=Settings)


def parse_config(config_type: type[_S], values: Mapping[str, Any]) -> _S:
    """Validate settings; a mistake becomes a one-line `ConfigError` that names the setting."""
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}{': ' * bool(where)}{first['msg'].removeprefix('Value error, ')}") from error


def seen_at(config: ModelConfig, view: View) -> ModelConfig:
    """Settings of the same model whose images are a view. Raises `ConfigError`, also where images have one size."""
    if "view" not in type(config).model_fields:
        raise ConfigError("images of this kind of model have one size; omit --resolution and --region")
    return parse_config(type(config), config.model_dump() | {"view": view.model_dump()})


def build_model(family_name: str, config: Mapping[str, Any] | ModelConfig) -> LatentModel:
    """A freshly initialised model. Raises `ConfigError`."""
    found = family(family_name)
    settings = config if isinstance(config, found.config) else parse_config(found.config, dict(config))
    return found.build(settings)


def skeleton(family_name: str, config: Mapping[str, Any] | ModelConfig) -> LatentModel:
    """The model without values: names, shapes and sizes of all it has, for the memory of none. Raises `ConfigError`."""
    import torch

    with torch.device("meta"):
        return build_model(family_name, config)


def save_model(
    path: Path | str,
    family_name: str,
    model: LatentModel,
    state: Mapping[str, Tensor],
    extra: Mapping[str, Any],
) -> None:
    """Write `state` (weights of `model`, e.g. their moving average) atomically; `extra` is kept as JSON.

    Raises `DataError` if the file cannot be written.
    """
    from safetensors.torch import save

    metadata = {"family": family_name, "config": model.config.model_dump(mode="json"), **extra}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = save(tensors, {METADATA_KEY: json.dumps(metadata)})  # save_file's error on a full disk is no OSError
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Family, config and extras of a model file, without reading its weights. Raises `CheckpointError`."""
    path = Path(path)
    if not is_file(path):
        raise CheckpointError(f"no model file at {path}; train one with 'hflow-rt train'")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({_short(error)}); copy or train it again"
        ) from error
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path} holds tensors but no hflow-rt settings; it was not written by hflow-rt")
    try:
        parsed: dict[str, Any] = json.loads(metadata[METADATA_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: the settings inside are not JSON ({error})") from error
    if not (
        isinstance(parsed, dict) and isinstance(parsed.get("family"), str) and isinstance(parsed.get("config"), dict)
    ):
        raise CheckpointError(f"{path}: the settings inside must hold a family and its config; train it again")
    return parsed


def load_model(path: Path | str) -> LatentModel:
    """Rebuild the model of a file, in eval mode on the CPU. Raises `CheckpointError` or `ConfigError`."""
    metadata = read_metadata(path)
    model = build_model(metadata["family"], metadata["config"])
    load_state(model, read_state(path), str(path))
    model.eval()
    return model


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The weights of a model file, on the CPU. Raises `CheckpointError`."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({_short(error)}); copy or train it again"
        ) from error


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`; every name must fit in shape and be finite. Raises one `CheckpointError` for all."""
    check_state(module, state, source)
    module.load_state_dict(dict(state))


def check_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Hold `state` against `module`, which may be on the meta device: names, kinds, shapes, finite values.

    Raises one `CheckpointError` that counts every problem and shows the first ones of each kind.
    """
    own = module.state_dict()
    problems: dict[str, list[str]] = {
        "missing": [f"missing {name} {list(own[name].shape)}" for name in own if name not in state],
        "of another shape or kind": [],
        "not finite": [],
        "unexpected": [f"unexpected {name} {list(state[name].shape)}" for name in state if name not in own],
    }
    for name in own.keys() & state.keys():
        found, needed = state[name], own[name]
        if found.shape != needed.shape or found.is_floating_point() != needed.is_floating_point():
            there, here = (
                (list(found.shape), list(needed.shape)) if found.shape != needed.shape else (found.dtype, needed.dtype)
            )
            problems["of another shape or kind"].append(f"{name} is {there} in the file and {here} in the model")
        elif found.is_floating_point() and not bool(found.isfinite().all()):
            problems["not finite"].append(f"{name} holds NaN or infinite values")
    total = sum(map(len, problems.values()))
    if not total:
        return
    kinds = {kind: sorted(found) for kind, found in problems.items() if found}
    shown = [line for found in kinds.values() for line in found[: max(1, 3 // len(kinds))]]
    if total > len(shown):
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items())
        shown.append(f"and {total - len(shown)} more ({counts} in all)")
    raise CheckpointError(f"{source} does not fit the model: {'; '.join(shown)}")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
