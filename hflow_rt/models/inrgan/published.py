"""Reads snapshots of the published implementation: one pickle of whole networks, with the text of their modules.

Unpickled as the original does, that text would be executed. Here it is not even looked at: a network is the record of
its attributes, of which weights, buffers and the settings it was made with are taken. Caches among the attributes,
which may be larger than all weights, are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.foreign.modules import MOST_ENTRIES, is_module, module_tensors
from hflow_rt.foreign.parts import Part
from hflow_rt.foreign.pickles import Function, Inert, StandIn
from hflow_rt.foreign.settings import read_settings_file
from hflow_rt.foreign.source import shown
from hflow_rt.foreign.states import read_pickle
from hflow_rt.models.checkpoint import parse_config
from hflow_rt.models.inrgan.config import INRGANConfig
from hflow_rt.models.inrgan.published_settings import discriminator_settings, generator_settings
from hflow_rt.models.inrgan.weights import DROPPED, from_original
from hflow_rt.models.registry import Published

__all__ = ["read_published", "read_snapshot"]

T = TypeVar("T")

_PARTS = ("G_ema", "G")  # of which the first is what the original samples with
_CLASSES = ("omegaconf", "torch.nn.modules")  # whose instances become inert records
_LICENCE = "the authors put the published weights under the licence of StyleGAN2-ADA, which excludes commercial use"


def read_published(path: Path, settings: Path | str | None = None, part: str | None = None) -> Published:
    """Settings and weights of the snapshot at `path`; `settings` is JSON of ours that replaces some of those inside.

    part: `G_ema`, the default, or `G`. Nothing in the file is executed. Raises `CheckpointError` and `ConfigError`.
    """
    part = part or _PARTS[0]
    if part not in _PARTS:
        raise CheckpointError(f"{path}: --part must be one of {', '.join(_PARTS)}, not {shown(part)}")
    found, kwargs = read_snapshot(path, part)
    values = generator_settings(kwargs[part], str(path))
    if "D" in kwargs:
        values["discriminator"] = discriminator_settings(kwargs["D"])
    values |= {} if settings is None else read_settings_file(settings)
    try:
        config = parse_config(INRGANConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{settings or path}: {shown(str(error), 300)}") from error
    assert isinstance(config, INRGANConfig)
    kernels = sum(name.endswith(DROPPED) for name in found.weights)
    floats = {name: tensor.float() for name, tensor in found.weights.items()}
    return Published(
        config,
        from_original(floats),
        {"constant kernels": kernels} if kernels else {},
        (_LICENCE,),
        part,
        "",
        found.passed_over,
    )


def read_snapshot(path: Path, part: str) -> tuple[Part[Any], dict[str, dict[str, Any]]]:
    """The tensors of one network of a snapshot, and by network the arguments each was made with.

    Raises `CheckpointError`.
    """
    kwargs: dict[str, dict[str, Any]] = {}
    known = {
        "torch_utils.persistence._reconstruct_persistent_obj": Function(_network),
        "collections.defaultdict": Function(lambda _: {}),  # caches
        **{name: StandIn(name) for name in ("builtins.dict", "typing.Any", "dnnlib.util.EasyDict")},
    }
    found = read_pickle(path, known, _CLASSES, partial(_choose, kwargs=kwargs, file=str(path), part=part))
    return found, kwargs


def _network(arguments: tuple[Any, ...]) -> Inert:
    """The record of a network or layer, in place of the object that the text of its module would make."""
    match arguments:
        case ({"type": "class", "class_name": str(name), "state": dict(state)},):
            return Inert(name, state)
    raise ValueError("a network is made of odd arguments")


def _choose(value: Any, kind: type[T], *, kwargs: dict[str, dict[str, Any]], file: str, part: str) -> Part[T]:
    networks = {name: entry for name, entry in value.items() if is_module(entry)} if isinstance(value, dict) else {}
    if part not in networks:
        have = ", ".join(shown(str(name)) for name in networks) or "none"
        raise CheckpointError(f"{file} must hold the network {part}, as published snapshots do; it has {have}")
    for name, network in networks.items():
        assert network.state is not None
        kwargs[str(name)] = _plain(network.state.get("_init_kwargs"), [MOST_ENTRIES])
    weights = dict(module_tensors(networks[part], kind, file, [MOST_ENTRIES]))
    others = {shown(str(name)): "a network" if name in networks else "settings" for name in value if name != part}
    return Part(weights, part, "", others)


def _plain(value: Any, left: list[int]) -> Any:
    """Nested settings as plain dictionaries. Raises `ValueError` for those that never end."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("its settings never end")
    if isinstance(value, Inert):
        value = value.items or {}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, left) for name, inner in value.items()}
    return value
