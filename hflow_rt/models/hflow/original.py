"""Reads the original's settings file (spec 1.7) into ours. Every accepted option without effect is ignored."""

from collections.abc import Mapping
from typing import Any

from hflow_rt.errors import ConfigError
from hflow_rt.models.checkpoint import parse_config
from hflow_rt.models.hflow.config import HFlowConfig

__all__ = ["read_settings"]


def read_settings(settings: Mapping[str, Any]) -> HFlowConfig:
    """The original's settings (with or without the `MODEL_PARAMETERS` wrapper) as an `HFlowConfig`.

    Raises `ConfigError` for a missing key or a value we do not support. `settings` is not changed.
    """
    try:
        parameters = {key.upper(): value for key, value in settings.items()}
        general = {key.upper(): value for key, value in parameters.get("GENERAL", {}).items()}
        parameters = {key.upper(): value for key, value in parameters.get("MODEL_PARAMETERS", parameters).items()}
        end = {key.upper(): value for key, value in parameters["ENDBLOCK_SETTINGS"].items()}
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
    config = parse_config(HFlowConfig, values)
    assert isinstance(config, HFlowConfig)
    if config.maps_style and end.get("GLOBAL_STATE_HIDDEN_CHANNELS", config.style_channels) != config.style_channels:
        raise ConfigError("GLOBAL_STATE_HIDDEN_CHANNELS must equal GLOBAL_NET_CHANNELS")
    if end.get("ENDRES", 1) != 1:
        raise ConfigError(f"ENDRES must be 1, not {end['ENDRES']}")
    if end.get("AUTOENCODER_CHANNELS", config.end.width) != config.end.width:
        raise ConfigError("AUTOENCODER_CHANNELS must equal ENDBLOCK_TOT_CHANNELS")
    return config


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
