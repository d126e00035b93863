"""Named settings: the two published models, a 64-pixel one, and a small one for a CPU."""

from typing import Any

__all__ = ["PRESETS", "TINY"]

_END = {
    "channels": [4, 508],
    "condition_channels": [32],
    "steps": [8, 8],
    "coupling_channels": [64, 512],
    "noise": [0.05, 0.05],
    "hidden_from_style": [0, 4],
    "hidden_from_base": [0, 512],
}


def _published(resolutions: tuple[int, int]) -> dict[str, Any]:
    """Levels of the published presets, which differ only in the two finest resolutions."""
    hierarchy = "hblocks-lblocks-blocks-channels"
    return {
        "levels": [
            {
                "resolution": resolutions[0], "channels": 3, "steps": 4, "split": "blocks-channels",
                "coupling_channels": 32, "unet_growth": 1.1, "unet_depth": 2, "unet_double": True,
                "encoder_channels": 64, "decoder_channels": 64, "condition_channels": 16,
            },
            {
                "resolution": resolutions[1], "channels": 4, "loss_weight": 10, "noise": 0.4, "split": hierarchy,
                "coupling_channels": 64, "unet_depth": 2, "unet_double": True, "encoder_channels": 256,
                "decoder_channels": 256, "condition_channels": 32, "skip_channels": 8, "refine": True,
            },
            {
                "resolution": 32, "channels": 8, "loss_weight": 10, "noise": 0.4, "split": hierarchy,
                "coupling_channels": 128, "encoder_channels": 256, "decoder_channels": 512,
                "condition_channels": 64, "skip_channels": 32, "refine": True,
            },
            {
                "resolution": 8, "channels": 8, "noise": 0.05, "split": "channels", "coupling_channels": 128,
                "encoder_channels": 256, "decoder_channels": 512, "condition_channels": 128, "skip_channels": 32,
                "refine": True, "style": True, "norm": True,
            },
        ],
        "end": _END,
        "style_channels": 512,
    }  # fmt: skip


_SMALL_END = {
    "condition_channels": [16],
    "steps": [4, 6],
    "noise": [0.05, 0.05],
    "hidden_from_style": [0, 4],
}

_HFLOW_64: dict[str, Any] = {
    "levels": [
        {
            "resolution": 64, "channels": 3, "steps": 4, "split": "blocks-channels", "coupling_channels": 32,
            "unet_growth": 1.1, "unet_depth": 2, "unet_double": True, "encoder_channels": 48,
            "decoder_channels": 48, "condition_channels": 16,
        },
        {
            "resolution": 32, "channels": 4, "loss_weight": 10, "noise": 0.4,
            "split": "hblocks-lblocks-blocks-channels", "coupling_channels": 48, "unet_depth": 2,
            "encoder_channels": 96, "decoder_channels": 96, "condition_channels": 32, "skip_channels": 8,
            "refine": True,
        },
        {
            "resolution": 8, "channels": 8, "noise": 0.05, "split": "channels", "coupling_channels": 96,
            "encoder_channels": 128, "decoder_channels": 192, "condition_channels": 64, "skip_channels": 32,
            "refine": True, "style": True, "norm": True,
        },
    ],
    "end": _SMALL_END | {
        "channels": [4, 124], "coupling_channels": [32, 128], "hidden_from_base": [0, 128],
    },
    "style_channels": 128,
}  # fmt: skip

_HFLOW_DEMO: dict[str, Any] = {
    "levels": [
        {
            "resolution": 32, "channels": 3, "steps": 4, "split": "blocks-channels", "coupling_channels": 24,
            "unet_growth": 1.1, "unet_depth": 2, "encoder_channels": 32, "decoder_channels": 32,
            "condition_channels": 16,
        },
        {
            "resolution": 16, "channels": 4, "loss_weight": 10, "noise": 0.4, "steps": 4,
            "split": "blocks-channels", "coupling_channels": 32, "encoder_channels": 64, "decoder_channels": 64,
            "condition_channels": 24, "skip_channels": 8,
        },
        {
            "resolution": 8, "channels": 8, "noise": 0.05, "steps": 4, "split": "channels",
            "coupling_channels": 64, "encoder_channels": 64, "decoder_channels": 96, "condition_channels": 32,
            "skip_channels": 16, "style": True, "norm": True,
        },
    ],
    "end": _SMALL_END | {
        "channels": [4, 60], "steps": [4, 4], "coupling_channels": [32, 64], "hidden_from_base": [0, 64],
    },
    "style_channels": 64,
}  # fmt: skip

# What ships: as much of the budget as possible lies in the coarse levels, where weights cost little time. Their targets
# get seven and four times the noise of the published settings: nothing else limits what a target holds (spec 3.3), and
# at 0.05 the 8x8 level held 1,450 bits an image that its flow could not learn to draw, at 0.35 it is 400.
_HFLOW_EMOJI: dict[str, Any] = {
    "levels": [
        {
            "resolution": 64, "channels": 3, "steps": 4, "split": "blocks-channels", "coupling_channels": 16,
            "unet_growth": 1.3, "unet_depth": 2, "unet_double": True, "encoder_channels": 16,
            "decoder_channels": 20, "condition_channels": 12,
        },
        {
            "resolution": 32, "channels": 4, "loss_weight": 10, "noise": 0.4, "steps": 4,
            "split": "hblocks-lblocks-blocks-channels", "coupling_channels": 24, "unet_depth": 2,
            "encoder_channels": 40, "decoder_channels": 44, "condition_channels": 16, "skip_channels": 4,
        },
        {
            "resolution": 8, "channels": 8, "noise": 0.35, "steps": 8, "split": "channels",
            "coupling_channels": 64, "encoder_channels": 64, "decoder_channels": 96, "condition_channels": 32,
            "skip_channels": 16, "style": True, "norm": True,
        },
    ],
    "end": _SMALL_END | {
        "channels": [4, 60], "steps": [4, 6], "coupling_channels": [32, 80], "hidden_from_base": [0, 64],
        "noise": [0.2, 0.2],
    },
    "style_channels": 64,
}  # fmt: skip


def _weighted(model: dict[str, Any], weights: list[float]) -> dict[str, Any]:
    """The same model with other loss weights, finest first."""
    levels = [level | {"loss_weight": weight} for level, weight in zip(model["levels"], weights, strict=True)]
    return model | {"levels": levels}


_PUBLISHED_TRAINING: dict[str, Any] = {
    "batch_size": 4,
    "accumulate": 4,
    "images": 60_000_000,
    "learning_rates": {"encoders": 5e-4, "decoders": 2e-3, "flows": 5e-3},
    # spec 4.1 in images, with an epoch of 30,000
    "decay_start_images": 300_000,
    "decay_every_images": 60_000,
    "decay_factors": {"encoders": 0.92, "decoders": 0.95, "flows": 0.95},
    "cut_images": {"encoders": 1_800_000},
}

PRESETS: dict[str, dict[str, Any]] = {
    "hflow-256": {"model": _published((256, 128)), "training": _PUBLISHED_TRAINING},
    "hflow-128": {"model": _published((128, 64)), "training": _PUBLISHED_TRAINING},
    "hflow-64": {"model": _HFLOW_64, "training": _PUBLISHED_TRAINING | {"batch_size": 16, "accumulate": 1}},
    # an hour of one CPU core; then half of one for the coarse flows alone, at ten times the images a second
    "hflow-emoji": {
        "model": _HFLOW_EMOJI,
        "training": _PUBLISHED_TRAINING
        | {
            "images": 90_000,
            "batch_size": 16,
            "accumulate": 1,
            "ema_weight": 0.01,
            "ema_warmup_images": 2000,
            "decay_start_images": 60_000,
            "decay_every_images": 1000,
            "cut_images": {},
            "decay_factors": {"encoders": 0.9, "decoders": 0.9, "flows": 0.9},
        },
    },
    "hflow-emoji-coarse": {
        "model": _weighted(_HFLOW_EMOJI, [0, 0, 1]),
        "training": _PUBLISHED_TRAINING
        | {
            "images": 420_000,
            "batch_size": 32,
            "accumulate": 1,
            "ema_weight": 0.005,
            "ema_warmup_images": 2000,
            "decay_start_images": 200_000,
            "decay_every_images": 6_000,
            "cut_images": {},
            "decay_factors": {"encoders": 0.9, "decoders": 0.9, "flows": 0.9},
            "learning_rates": {"encoders": 0, "decoders": 0, "flows": 3e-3},
            # what the finer levels see must not move
            "frozen": ["*encoder.*", "*decoder.*", "end_output.*", "levels.*.skip.*"],
            "sample_every_images": 40_000,
            "evaluate_every_images": 100_000,
            "checkpoint_every_images": 40_000,
        },
    },
    # minutes instead of days: the average follows within 50 steps
    "hflow-demo": {
        "model": _HFLOW_DEMO,
        "training": _PUBLISHED_TRAINING
        | {"images": 100_000, "batch_size": 16, "accumulate": 1, "ema_weight": 0.02, "ema_warmup_images": 1000},
    },
}

# of a few kilobytes, with every part that others have
TINY: dict[str, Any] = {
    "model": {
        "levels": [
            {
                "resolution": 16, "channels": 3, "steps": 2, "split": "blocks-channels", "coupling_channels": 8,
                "encoder_channels": 6, "decoder_channels": 6, "condition_channels": 4,
            },
            {
                "resolution": 8, "channels": 4, "steps": 2, "split": "channels", "coupling_channels": 8, "noise": 0.2,
                "encoder_channels": 6, "decoder_channels": 8, "condition_channels": 4, "skip_channels": 3,
                "style": True, "norm": True,
            },
        ],
        "end": {
            "channels": [2, 6], "condition_channels": [4], "steps": [2, 2], "coupling_channels": [8, 8],
            "hidden_from_style": [0, 2], "hidden_from_base": [0, 8],
        },
        "style_channels": 8,
    },
    "training": _PUBLISHED_TRAINING | {"batch_size": 4, "accumulate": 1, "init_images": 8},
}  # fmt: skip
