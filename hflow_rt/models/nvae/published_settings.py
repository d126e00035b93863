"""What the published training script's options say of a model (spec 1, 7 and 10)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hflow_rt.errors import ConfigError
from hflow_rt.foreign.source import shown
from hflow_rt.models.nvae.config import halved_groups

__all__ = ["settings_of_options"]

_OLD = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}  # what files lack that are older
_BINARY = ("mnist", "omniglot")
_SIDES = {"cifar10": 32, "ffhq": 256}
_SIDE_IN_NAME = re.compile(r"(?:celeba|imagenet|lsun_[a-z]+)_(\d{1,4})")
_NAMES = {
    "latent_channels": "num_latent_per_group",
    "encoder_width": "num_channels_enc",
    "decoder_width": "num_channels_dec",
    "blocks": "num_preprocess_blocks",
    "block_cells": "num_preprocess_cells",
    "decoder_block_cells": "num_postprocess_cells",
    "encoder_cells": "num_cell_per_cond_enc",
    "decoder_cells": "num_cell_per_cond_dec",
    "flows": "num_nf",
    "squeeze_excite": "use_se",
    "residual_posterior": "res_dist",
    "kl_warmup": "kl_anneal_portion",
    "kl_constant": "kl_const_portion",
    "kl_floor": "kl_const_coeff",
    "weight_penalty": "weight_decay_norm",
}
_CELLS = "res_mbconv"
_MOST_SCALES = 10


def settings_of_options(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our settings, unchecked, of options by their published names. Raises `ConfigError`."""

    def option(name: str) -> Any:
        if name not in options and name not in _OLD:
            raise ConfigError(f"{source} must tell the option {name} of published NVAE models, and does not")
        return options.get(name, _OLD.get(name))

    def whole(name: str, least: int, most: int) -> int:
        value = option(name)
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(f"{source}: {name} must be a whole number from {least} to {most}, not {_line(value)}")
        return value

    if (cells := option("arch_instance")) != _CELLS:
        raise ConfigError(f"{source}: arch_instance must be {_CELLS}, the only one that is known, not {_line(cells)}")
    before, after = (whole(f"num_{kind}process_blocks", 0, 8) for kind in ("pre", "post"))
    if before != after:
        raise ConfigError(f"{source}: num_preprocess_blocks and num_postprocess_blocks differ: {before} and {after}")
    groups, scales = whole("num_groups_per_scale", 1, 256), whole("num_latent_scales", 1, _MOST_SCALES)
    if (groups, scales) == (1, 1):
        raise ConfigError(f"{source} holds a model of one group and one scale, which has no towers and is not known")
    values: dict[str, Any] = {ours: option(theirs) for ours, theirs in _NAMES.items()}
    values |= _data(option("dataset"), option, source)
    fewest = whole("min_groups_per_scale", 1, 256)
    values["groups"] = halved_groups(groups, scales, fewest) if option("ada_groups") else (groups,) * scales
    if option("weight_decay_norm_anneal"):
        values["weight_penalty_start"] = option("weight_decay_norm_init")
    return values


def _data(name: Any, option: Callable[[str], Any], source: str) -> dict[str, Any]:
    """Size, channels and distribution of images, by the name of the dataset."""
    if name in _BINARY:
        return {"resolution": 28, "padding": 2, "channels": 1, "output": "bernoulli", "bits": 1}
    match = _SIDE_IN_NAME.fullmatch(name) if isinstance(name, str) else None
    side = int(match[1]) if match else _SIDES.get(name) if isinstance(name, str) else None
    if side is None:
        raise ConfigError(f"{source}: dataset must be one of the published ones, not {_line(name)}")
    mixtures = option("num_mixture_dec")
    output = {"output": "normal"} if mixtures == 1 else {"mixtures": mixtures}
    return {"resolution": side, "bits": option("num_x_bits"), **output}


def _line(value: object) -> str:
    return shown(str(value), 300)
