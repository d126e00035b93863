"""Reads weights of public PyTorch implementations: bare state dicts and Lightning checkpoints (spec 6 and 11).

Such files hold no settings. All that shapes and names tell is taken from the weights, the rest from a JSON file of
our settings, which may also overrule what was told by the layout alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.foreign.parts import Naming
from hflow_rt.foreign.settings import read_settings_file
from hflow_rt.foreign.source import shown
from hflow_rt.foreign.states import read_weights
from hflow_rt.models.checkpoint import parse_config
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.weights import Layout, from_original, ignored_kind, layout_of
from hflow_rt.models.registry import Published

__all__ = ["infer_settings", "read_published"]

# Classes that become inert records: what Lightning keeps beside the weights.
_CLASSES = ("pytorch_lightning", "lightning", "lightning_fabric")
_NAMING = Naming(
    r"blocks\.0\.flows\.0\.|flow\.layers\.1\.",
    "blocks.0.flows.0... or flow.layers.1..., as published Glow models do",
)
_BITS_UNKNOWN = "the file does not say how many bits its data had: 8 were taken; say otherwise in --settings"


def read_published(path: Path, settings: Path | str | None = None, part: str | None = None) -> Published:
    """Settings and weights of the file at `path`; `settings` is JSON of our settings, as far as needed.

    part: which weights of several. Nothing in the file is executed. Raises `CheckpointError` and `ConfigError`.
    """
    found = read_weights(path, _CLASSES, _NAMING, part)
    state = found.weights
    given: dict[str, Any] = {} if settings is None else dict(read_settings_file(settings))
    values = infer_settings(state, str(path)) | given
    if "resolution" not in values:
        raise ConfigError(
            f'{path} does not say the side of its images; give it in a JSON file, such as {{"resolution": 64}}, '
            "with --settings FILE"
        )
    try:
        config = parse_config(GlowConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{settings or path}: {shown(str(error), 300)}") from error
    assert isinstance(config, GlowConfig)
    _check_steps(config, state, str(path))
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    dropped = Counter(kind for name in state if (kind := ignored_kind(name)) is not None)
    notes = () if "bits" in given else (_BITS_UNKNOWN,)
    weights = from_original(config, floats, str(path))
    return Published(config, weights, dict(dropped), notes, found.name, found.prefix, found.passed_over)


def infer_settings(state: Mapping[str, Tensor], source: str = "the file") -> dict[str, Any]:
    """Settings as far as names and shapes tell. Raises `CheckpointError`."""
    layout = layout_of(state, source)
    levels, steps = _depth(state, layout, source)
    first, out, mixing = _parts(layout)
    if first not in state or out not in state or state[first].dim() != 4 or state[out].dim() != 4:
        raise CheckpointError(f"{source} lacks the subnet of its first step ({first}); give a whole file")
    values: dict[str, Any] = {
        "levels": levels,
        "steps": steps,
        "hidden_channels": state[first].shape[0],
        "coupling": "affine" if state[out].shape[0] == 2 * state[first].shape[1] else "additive",
        "permutation": "conv1x1" if any(name.startswith(mixing) for name in state) else "shuffle",
        "lu": any(f"{mixing}{leaf}" in state for leaf in ("w_l", "lower")),
        "split_prior": False,
        "top_prior": "learned" if "learn_top_fn.conv.bias" in state else "fixed",
    }
    if layout == "blocks":
        scale = {"scale": "exp_sigmoid"} if values["coupling"] == "affine" else {}
        return values | {"edge": "ones", "hidden": "bias", "moving": "first"} | scale
    values |= {"edge": "zero", "split_prior": f"flow.layers.{steps + 1}.conv.conv.weight" in state}
    if (label := state.get("project_ycond.linear.weight")) is not None and label.dim() == 2:
        values["classes"] = tuple(map(str, range(label.shape[1])))
        values["classifier"] = "project_class.linear.weight" in state
    if (prior := state.get("prior_h")) is not None and prior.dim() == 4:
        values["resolution"] = prior.shape[3] * 2**levels
    return values


def _depth(state: Mapping[str, Tensor], layout: Layout, source: str) -> tuple[int, int]:
    """Numbers of levels and of steps a level."""
    if layout == "blocks":
        places = [m for name in state if (m := re.match(r"blocks\.(\d{1,4})\.flows\.(\d{1,4})\.", name))]
        return 1 + max(int(m[1]) for m in places), 1 + max(int(m[2]) for m in places)
    indices = {int(m[1]) for name in state if (m := re.match(r"flow\.layers\.(\d{1,6})\.actnorm\.", name))}
    steps = 0  # steps lie side by side, a squeeze and a split between levels
    while steps + 1 in indices:
        steps += 1
    if steps == 0:
        raise CheckpointError(f"{source} has no steps that begin at flow.layers.1; give a whole file")
    return max(indices) // (steps + 2) + 1, steps


def _parts(layout: Layout) -> tuple[str, str, str]:
    """Names in the first step: of the subnet's first and last weight, and of what the mixing's begin with."""
    if layout == "blocks":
        step = "blocks.0.flows.0."
        return f"{step}coupling.nets.0.0.weight", f"{step}coupling.nets.0.4.conv.weight", f"{step}invconv."
    step = "flow.layers.1."
    return f"{step}block.0.conv.weight", f"{step}block.4.conv.weight", f"{step}invconv."


def _check_steps(config: GlowConfig, state: Mapping[str, Tensor], source: str) -> None:
    """A step has at least 7 tensors: settings may not ask for many more modules than the file has."""
    steps = config.levels * config.steps
    if 7 * steps > len(state):
        raise CheckpointError(
            f"{source} holds {len(state):,} tensors, which {steps:,} flow steps cannot have; "
            "omit levels and steps from the settings"
        )
