"""Reads checkpoints of the published implementation (spec 3.6 and 4).

Such a file holds weights by name (`model`), their average as a list without names (`ema`), Adam's moments and
counters, but nothing of the settings beyond what names and shapes tell. The average is what the original samples with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.foreign.parts import Naming, Part, part_of
from hflow_rt.foreign.settings import read_settings_file
from hflow_rt.foreign.source import shown
from hflow_rt.foreign.states import read_part
from hflow_rt.foreign.tensors import StoredTensor
from hflow_rt.models.checkpoint import parse_config
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.presets import PRESETS
from hflow_rt.models.ihdm.weights import from_original, infer_network, parameter_order
from hflow_rt.models.registry import Published

__all__ = ["TrainingState", "read_published", "read_training_state"]

T = TypeVar("T")

_AVERAGE = "ema"
_NAMING = Naming(
    r"time_embed\.\d|input_blocks\.0\.0\.", "time_embed... and input_blocks..., as published IHDM models do"
)
_NEEDED = ("resolution", "steps", "blur_max")  # that no file tells


@dataclass(frozen=True)
class TrainingState:
    """All that a published run goes on from, by our names.

    step: updates done. moments: Adam's first and second, of `adam_step` updates. average_updates: of the average.
    """

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    average_updates: int
    moments: tuple[dict[str, Tensor], dict[str, Tensor]]
    adam_step: int


def read_published(path: Path, settings: Path | None = None, part: str | None = None) -> Published:
    """Settings and weights of the file at `path`; `settings` is JSON of ours, or of a `preset` and changes to it.

    part: `ema`, which is the default where there is any, or `model`. Nothing in the file is executed. Raises
    `CheckpointError` and `ConfigError`.
    """
    given = _given(settings)
    found = read_part(path, lambda value, kind: _choose(value, kind, str(path), part))
    network = infer_network({name: tuple(tensor.shape) for name, tensor in found.weights.items()}, str(path))
    # what names and shapes tell is so; settings that disagree are of another file
    if differing := [name for name, value in network.items() if name in given and _plain(given[name]) != value]:
        name = differing[0]
        raise ConfigError(
            f"{settings}: {name} is {_plain(given[name])}, and {path} has {network[name]}; "
            "give the settings that belong to it"
        )
    values = given | network | {"bank": 0, "moments": False}  # which no published file holds
    if missing := [name for name in _NEEDED if name not in values]:
        raise ConfigError(
            f"{path} does not say {' and '.join(missing)}; give them in a JSON file, or a preset such as "
            '{"preset": "ihdm-cifar"}, with --settings FILE'
        )
    config = _config(values, str(settings or path))
    floats = {name: tensor.float() for name, tensor in found.weights.items()}
    return Published(config, from_original(floats), {}, (), found.name, found.prefix, found.passed_over)


def read_training_state(path: Path) -> TrainingState:
    """Everything of a published checkpoint that a run needs to go on. Raises `CheckpointError`."""
    file = str(path)
    counters: dict[str, int] = {}

    def everything(value: Any, kind: type[T]) -> Part[T]:
        model = part_of(value, kind, file, _NAMING, "model")
        order = _order(model.weights, file)
        states = _at(value, file, "optimizer", "state")
        if not isinstance(states, dict) or set(states) != set(range(len(order))):
            raise CheckpointError(f"{file} must hold Adam's state of {len(order):,} tensors; give a whole file")
        lists = {
            _AVERAGE: _at(value, file, _AVERAGE, "shadow_params"),
            "m": [_at(states, file, index, "exp_avg") for index in range(len(order))],
            "v": [_at(states, file, index, "exp_avg_sq") for index in range(len(order))],
        }
        counters["step"] = _whole(_at(value, file, "step"), file)
        counters["average"] = _whole(_at(value, file, _AVERAGE, "num_updates"), file)
        tensors = {f"model.{name}": tensor for name, tensor in model.weights.items()}
        for key, listed in lists.items():
            named = _named(order, listed, model.weights, kind, file)
            tensors |= {f"{key}.{name}": tensor for name, tensor in named.items()}
        adam_step = _at(states, file, 0, "step")
        if isinstance(adam_step, kind):  # an int with older versions of torch
            tensors["adam_step"] = adam_step
        else:
            counters["adam"] = _whole(adam_step, file)
        return Part(tensors)

    found = read_part(path, everything).weights
    if "adam_step" in found:
        counters["adam"] = int(found["adam_step"].item())

    def below(key: str) -> dict[str, Tensor]:
        head = f"{key}."
        return from_original({n.removeprefix(head): tensor for n, tensor in found.items() if n.startswith(head)})

    moments = below("m"), below("v")
    return TrainingState(
        counters["step"], below("model"), below(_AVERAGE), counters["average"], moments, counters["adam"]
    )


def _given(settings: Path | None) -> dict[str, Any]:
    """Settings that the user names, a preset's below the changes to it."""
    values = {} if settings is None else dict(read_settings_file(settings))
    preset = values.pop("preset", None)
    if preset is None:
        return values
    if preset not in PRESETS:
        raise ConfigError(f"{settings}: preset must be one of {', '.join(sorted(PRESETS))}, not {shown(str(preset))}")
    return dict(PRESETS[preset]["model"]) | values


def _config(values: Mapping[str, Any], source: str) -> IHDMConfig:
    try:
        config = parse_config(IHDMConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {shown(str(error), 300)}") from error
    assert isinstance(config, IHDMConfig)
    return config


def _choose(value: Any, kind: type[T], file: str, part: str | None) -> Part[T]:
    """The average, zipped with the names of the weights, or the weights themselves."""
    average = value.get(_AVERAGE) if isinstance(value, dict) else None
    listed = average.get("shadow_params") if isinstance(average, dict) else None
    if listed is None or part not in (None, _AVERAGE):
        return part_of(value, kind, file, _NAMING, part)
    model = part_of(value, kind, file, _NAMING)
    named = _named(_order(model.weights, file), listed, model.weights, kind, file)
    beside = {name: what for name, what in model.passed_over.items() if name.partition(".")[0] != _AVERAGE}
    return Part(named, _AVERAGE, model.prefix, {model.name: f"{len(model.weights):,} tensors", **beside})


def _order(weights: Mapping[str, Any], file: str) -> list[str]:
    """Names in construction order. The values are stored tensors, or tensors."""
    network = infer_network({name: _shape(tensor) for name, tensor in weights.items()}, file)
    side = 1 << (len(network["widths"]) + 1)  # any that fits
    config = _config({**network, "resolution": max(4, side), "steps": 2, "blur_max": 1.0}, file)
    return parameter_order(config, list(weights), file)


def _named(order: Sequence[str], listed: Any, weights: Mapping[str, T], kind: type[T], file: str) -> dict[str, T]:
    """A list without names, of tensors like the weights in their order."""
    if not isinstance(listed, list) or len(listed) != len(order):
        count = len(listed) if isinstance(listed, list) else "none"
        raise CheckpointError(f"{file} must list {len(order):,} tensors beside its weights, not {count}")
    for name, tensor in zip(order, listed, strict=True):
        if not isinstance(tensor, kind) or _shape(tensor) != _shape(weights[name]):
            raise CheckpointError(f"{file}: a list has no tensor of the shape of {shown(name)}; give an intact file")
    return dict(zip(order, listed, strict=True))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tensor.size if isinstance(tensor, StoredTensor) else tuple(tensor.shape)


def _at(value: Any, file: str, *keys: str | int) -> Any:
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise CheckpointError(f"{file} lacks {'.'.join(map(str, keys))}, which a run goes on from")
        value = value[key]
    return value


def _whole(value: Any, file: str) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file}: counters of steps must be whole numbers; give an intact file")
    return value


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
