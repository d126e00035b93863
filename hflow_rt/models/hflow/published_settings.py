"""Reads the original's settings file (spec 1.7) into ours. Every accepted option without effect is ignored."""

from collections.abc import Mapping
from typing import Any

from hflow_rt.errors import ConfigError
from hflow_rt.foreign.source import shown
from hflow_rt.models.checkpoint import parse_config
from hflow_rt.models.hflow.config import HFlowConfig

__all__ = ["read_settings"]

_LARGEST = 1 << 16  # of any number that describes the model
_TEXTS = ("split", "coupling")
_MESSAGE = 300


def read_settings(settings: Mapping[str, Any]) -> HFlowConfig:
    """The original's settings (with or without the `MODEL_PARAMETERS` wrapper) as an `HFlowConfig`.

    They may come from anybody: numbers are moderate before anything is made of them, and what a message quotes is
    escaped. Raises `ConfigError` for a missing key or a value we do not support. `settings` is not changed.
    """
    try:
        return _read(settings)
    except ConfigError as error:
        raise ConfigError(shown(str(error), _MESSAGE)) from error


def _read(settings: Mapping[str, Any]) -> HFlowConfig:
    try:
        parameters = _upper(settings)
        general = _upper(parameters.get("GENERAL", {}))
        parameters = _upper(parameters.get("MODEL_PARAMETERS", parameters))
        end = _upper(parameters["ENDBLOCK_SETTINGS"])
        values = {
            "levels": [_level(parameters, index) for index in range(len(parameters["RESOLUTIONS"]))],
            "end": _end(end),
            "style_channels": parameters["GLOBAL_NET_CHANNELS"],
            "encoder_lr_scale": parameters["ENCODER_LR_SCALE"],
            "decoder_lr_scale": parameters["DECODER_LR_SCALE"],
            "bits": general.get("DISCRETIZATION_BITS", 8),
        }
    except KeyError as error:
        raise ConfigError(f"the original's settings need {error.args[0]}, which is missing") from error
    except IndexError as error:
        raise ConfigError("every list of the original's settings needs one entry a level") from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"the original's settings hold a value of an unexpected kind ({error})") from error
    for key, value in values.items():
        _check_numbers(key, value)
    config = parse_config(HFlowConfig, values)
    assert isinstance(config, HFlowConfig)
    if config.maps_style and end.get("GLOBAL_STATE_HIDDEN_CHANNELS", config.style_channels) != config.style_channels:
        raise ConfigError("GLOBAL_STATE_HIDDEN_CHANNELS must equal GLOBAL_NET_CHANNELS")
    if end.get("ENDRES", 1) != 1:
        raise ConfigError(f"ENDRES must be 1, not {end['ENDRES']}")
    if end.get("AUTOENCODER_CHANNELS", config.end.width) != config.end.width:
        raise ConfigError("AUTOENCODER_CHANNELS must equal ENDBLOCK_TOT_CHANNELS")
    return config


def _upper(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the keys in upper case, as the original reads them; two may not become one."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key.upper() in found:
            raise ConfigError(f"the original's settings hold {key.upper()} in two spellings; keep one")
        found[key.upper()] = value
    return found


def _check_numbers(name: str, value: object) -> None:
    """Hold our settings within bounds. A text would be taken for the number that it spells."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _TEXTS:
                _check_numbers(f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_numbers(f"{name}.{index}", inner)
    elif isinstance(value, str):
        raise ConfigError(f"{name} must be a number, not the text '{value}'")
    elif isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
        raise ConfigError(f"{name} must be within {_LARGEST:,}, not {value:,}")


def _level(p: Mapping[str, Any], index: int) -> dict[str, Any]:
    flags = p["AUGMENTATION_TYPES"][index]
    pooling = p["POOLING_TYPE"][index]
    width = p["RNVP_CHANNELS"][index]
    coupling = "cnn" if not pooling else "unet-unless-channels" if "blocks_only" in pooling else "unet"
    # the original loses a third of the width once "blocks_only" rebuilds its string of flags
    if "third-c" in pooling and coupling == "unet":
        width //= 3
    noised = index > 0 and "NOISE" in p["AUGMENTATION_TYPES"][index - 1]
    return {
        "resolution": p["RESOLUTIONS"][index],
        "channels": p["CHANNELS"][index],
        "loss_weight": p["LOSS_WEIGHTS"][index],
        "prior_std": p["PRIOR_STDS"][index],
        "noise": p["DECODER_REL_NOISE"][index - 1] if noised else None,
        "steps": p["NUM_LAYERS"][index],
        "split": p["FLOW_SPLIT_TYPES"][index],
        "mixing_scale": p["PERMUTE_SCALING"][index],
        "unitary": p["USE_UNITARY_PERMUTE"][index],
        "coupling": coupling,
        "coupling_channels": width,
        "coupling_kernel": p["RNVP_KERNEL_SIZES"][index],
        "unet_growth": p["UNET_C_MULT"][index],
        "unet_depth": p["UNET_N_DOWNSCALES"][index],
        "unet_pointwise": "reduced" in pooling,
        "unet_double": "double" in pooling,
        "encoder_channels": p["ENCODER_CHANNELS"][index],
        "encoder_kernel": p["ENCODER_DECODER_KERNELS"][index],
        "decoder_channels": p["DECODER_CHANNELS"][index],
        "condition_channels": p["COND_OUT_C"][index],
        "skip_channels": p["SKIPS_CHANNELS"][index - 1] if index else 0,
        "refine": "NOEUNET" not in flags,
        "style": "NO_STYLE" not in flags,
        "norm": "NO_NORM" not in flags,
    }


def _end(e: Mapping[str, Any]) -> dict[str, Any]:
    channels = list(e["CHANNELS"])
    if channels[-1] == -1:
        channels[-1] = e["ENDBLOCK_TOT_CHANNELS"] - sum(channels[:-1])
    if sum(channels) != e["ENDBLOCK_TOT_CHANNELS"]:
        raise ConfigError(f"the end parts {channels} must add up to ENDBLOCK_TOT_CHANNELS {e['ENDBLOCK_TOT_CHANNELS']}")
    return {
        "channels": channels,
        "condition_channels": e["COND_OUTPUT_CHANNELS"][1:],
        "steps": e["LAYERS"],
        "coupling_channels": e["RNVP_CHANNELS"],
        "unitary": e["USE_UNITARY_PERMUTE"],
        "mixing_scale": e["PERMUTE_SCALING"],
        "noise": e["STYLE_REL_NOISES"] if "NOISE" in e["AUGMENTATION_TYPE"] else None,
        "style_noise_scale": e["STYLE_REL_NOISE_SCALE"],
        "constant_start": e["BLOCK_Y0"],
        "hidden_from_style": e["MASK_FOR_STYLE_IND"],
        "hidden_from_base": e["MASK_FOR_BASE_IND"],
        "mapping_lr_scale": e["MAPPING_NETWORK_LR_SCALE"],
    }
