"""Reads checkpoints of the published implementation (spec 14).

Such a file holds the weights by name (`state_dict`) and the options of the training script (`args`), which tell the
whole architecture, beside what training goes on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.foreign.parts import Naming, Part, part_of
from hflow_rt.foreign.pickles import Inert
from hflow_rt.foreign.settings import own_settings
from hflow_rt.foreign.source import shown
from hflow_rt.foreign.states import read_part
from hflow_rt.models.checkpoint import parse_config
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.presets import PRESETS
from hflow_rt.models.nvae.published_settings import settings_of_options
from hflow_rt.models.nvae.weights import from_original, is_duplicate
from hflow_rt.models.registry import Published

__all__ = ["read_published"]

T = TypeVar("T")

_NAMING = Naming(r"prior_ftr0", "prior_ftr0, stem..., as published NVAE models do")
_LICENCE = "weights that the authors of NVAE published are for non-commercial use only"
_TENSORS_OF_A_CELL = 14  # of the smallest cell, at least


def read_published(path: Path, settings: Path | str | None = None, part: str | None = None) -> Published:
    """Settings and weights of the file at `path`; `settings` is JSON of ours, or of a `preset` and changes to it, or
    the name of a preset.

    They overrule what options in the file say, and are needed where it has none. part: which weights of several.
    Nothing in the file is executed. Raises `CheckpointError` and `ConfigError`.
    """
    options: list[Mapping[str, Any]] = []

    def choose(value: Any, kind: type[T]) -> Part[T]:
        args = value.get("args") if isinstance(value, dict) else None
        if isinstance(args, Inert) and args.state is not None:
            options.append(args.state)
        return part_of(value, kind, str(path), _NAMING, part)

    found = read_part(path, choose)
    given = own_settings(settings, PRESETS)
    values = settings_of_options(options[0], str(path)) if options else {}
    if not options and not given:
        raise ConfigError(
            f"{path} does not say how the network is built; give it in a JSON file with --settings FILE, or name a"
            " preset, such as --preset nvae-cifar"
        )
    try:
        config = parse_config(NVAEConfig, values | given)
    except ConfigError as error:
        raise ConfigError(f"{settings or path}: {shown(str(error), 300)}") from error
    assert isinstance(config, NVAEConfig)
    _check_cells(config, len(found.weights), str(path))
    duplicates = sum(map(is_duplicate, found.weights))
    floats = {name: t.float() if t.is_floating_point() else t for name, t in found.weights.items()}
    dropped = {"duplicate weight": duplicates} if duplicates else {}
    return Published(config, from_original(floats), dropped, (_LICENCE,), found.name, found.prefix, found.passed_over)


def _check_cells(config: NVAEConfig, tensors: int, source: str) -> None:
    """Settings may not ask for many more modules than the file has."""
    groups = sum(config.groups)
    cells = groups * config.encoder_cells + (groups - 1) * config.decoder_cells
    cells += config.blocks * (config.block_cells + config.decoder_block_cells)
    if _TENSORS_OF_A_CELL * cells > tensors:
        raise CheckpointError(
            f"{source} holds {tensors:,} tensors, too few for the {cells:,} cells that its settings ask for; "
            "give the settings that belong to it"
        )
