"""Reads checkpoints of the published implementation (spec 4.4): its own container, or a bare state dict."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.foreign.parts import Naming, Part
from hflow_rt.foreign.settings import parse_settings, read_settings_file
from hflow_rt.foreign.source import Source, open_source, shown
from hflow_rt.foreign.states import read_stream, read_weights, skip_stream
from hflow_rt.models.hflow.config import HFlowConfig
from hflow_rt.models.hflow.network import HFlow
from hflow_rt.models.hflow.published_settings import read_settings
from hflow_rt.models.hflow.weights import from_original, ignored_kind
from hflow_rt.models.registry import Published

__all__ = ["read_published"]

_MODULE = b"hflow.network"
_START = struct.pack("<I", len(_MODULE)) + _MODULE
# Classes that become inert records; the files name no others.
_CLASSES = ("hflow.network", "torch.nn.modules")
_NAMING = Naming(
    r"(?:blocks\.\d{1,4}\.(?:blocks\.steps|learned_upscaler)|endblock_\w{1,40}|global_state)\.",
    "blocks.0.blocks.steps..., endblock_... and global_state..., as published hflow models do",
)
_VALUES = 1 << 24  # of one level's target


def read_published(path: Path, settings: Path | str | None = None, part: str | None = None) -> Published:
    """Settings and weights of the file at `path`; `settings` replaces, or provides, the original's JSON.

    part: which weights of several. Nothing in the file is executed. Raises `CheckpointError` and `ConfigError`.
    """
    with open_source(path) as source:
        contained = _read_container(source, part) if source.peek(len(_START)) == _START else None
    found, embedded = contained or (read_weights(path, _CLASSES, _NAMING, part), None)
    state = found.weights
    if settings is not None:
        values = read_settings_file(settings)
    elif embedded is not None:
        values = embedded
    else:
        raise ConfigError(f"{path} holds no settings; give the original's JSON with --settings FILE")
    config = _config(values, str(settings or path))
    _check_steps(config, state, str(path))
    scales = {f"spread_{name}": torch.ones(()) for name in _skeleton(config, str(settings or path)).noised()}
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    weights = from_original(config, floats, str(path))
    if taken := sorted(weights.keys() & scales.keys()):
        raise CheckpointError(f"{path} holds {taken[0]}, which is no name of the original's; give a published file")
    dropped = Counter(kind for name in state if (kind := ignored_kind(name)) is not None)
    return Published(config, weights | scales, dict(dropped), (), found.name, found.prefix, found.passed_over)


def _read_container(source: Source, part: str | None) -> tuple[Part[Tensor], dict[str, Any] | None]:
    """Weights and settings. The module's name and source text are passed over, and so is Adam's state."""
    source.skip(source.length())
    source.skip(source.length())
    weights = read_stream(source, _CLASSES, part=part)
    if not isinstance(skip_stream(source), dict):
        raise source.broken("the optimizer's state is no dictionary")
    if not source.left:
        return weights, None
    size = source.length()
    if size != source.left:
        raise source.broken(f"{size:,} bytes of settings must end it, and {source.left:,} are left")
    return weights, parse_settings(source.read(size), source.name)


def _config(values: Mapping[str, Any], source: str) -> HFlowConfig:
    try:
        config = read_settings(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    for level in config.levels:
        if level.channels * level.resolution**2 > _VALUES:
            raise ConfigError(
                f"{source}: a level of {level.channels}x{level.resolution}x{level.resolution} is too large"
            )
    return config


def _check_steps(config: HFlowConfig, state: Mapping[str, Tensor], source: str) -> None:
    """A model has tens of modules a step: settings may not ask for more of them than the file has weights."""
    steps = sum(level.steps for level in config.levels) + sum(config.end.steps)
    if 3 * steps > len(state):
        raise CheckpointError(
            f"{source} holds {len(state):,} tensors, which {steps:,} flow steps of the settings cannot have; "
            "give the settings that belong to it"
        )


def _skeleton(config: HFlowConfig, source: str) -> HFlow:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return HFlow(config)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: no model can be built of the settings ({shown(str(error))})") from error
