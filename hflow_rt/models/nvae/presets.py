"""Named settings: the published models (spec 7), and two for a CPU."""

from typing import Any

from hflow_rt.models.nvae.config import halved_groups

__all__ = ["PRESETS", "TINY"]


def _training(
    images: int, epochs: int, batch: int, processes: int, rate: float = 1e-2, warmup_epochs: int = 5, **changes: Any
) -> dict[str, Any]:
    """The published recipe for so many images, with the batches of `processes` accumulated in one.

    The warm-up ends one update early, and the rate stays there until the cosine, which changes once an epoch.
    """
    updates = -(-images // processes) // batch
    step, warmup = batch * processes, warmup_epochs * updates
    return {
        "batch_size": batch,
        "accumulate": processes,
        "images": epochs * updates * step,
        "optimizer": "adamax",
        "eps": 1e-3,
        "weight_decay": 3e-4,
        "learning_rates": {"network": rate * (warmup - 1) / warmup},
        "final_rates": {"network": 1e-4},
        "warmup_images": (warmup - 1) * step,
        "decay": "cosine",
        "decay_start_images": warmup * step,
        "decay_every_images": updates * step,
        "grad_clip": None,
        "ema_weight": 1.0,
        "ema_warmup_images": 0,
        "added_noise_std": 0.0,
        **changes,
    }


def _width(channels: int) -> dict[str, int]:
    return {"encoder_width": channels, "decoder_width": channels}


_LARGE = {
    "resolution": 256, "bits": 5, "groups": halved_groups(16, 5, 4), "blocks": 1, "flows": 2,
    "weight_penalty_start": 1.0,
}  # fmt: skip
_CELEBA_256 = _training(27_000, 300, 4, 24)

PRESETS: dict[str, dict[str, Any]] = {
    "nvae-mnist": {
        "model": {
            "resolution": 28, "padding": 2, "channels": 1, "bits": 1, "output": "bernoulli", "groups": (10, 5),
            **_width(32), "blocks": 2, "block_cells": 3, "decoder_block_cells": 3,
        },
        "training": _training(60_000, 400, 200, 2, flip=False),
    },
    "nvae-cifar": {
        "model": {"resolution": 32, "groups": (30,), **_width(128), "blocks": 1, "flows": 1},
        "training": _training(50_000, 400, 32, 8),
    },
    "nvae-celeba-64": {
        "model": {
            "resolution": 64, "groups": (20, 10, 5), **_width(64), "blocks": 1, "flows": 1, "weight_penalty": 1e-1,
        },
        "training": _training(162_770, 90, 16, 8),
    },
    "nvae-imagenet-32": {
        "model": {
            "resolution": 32, "groups": (28,), **_width(192), "blocks": 1, "flows": 1, "weight_penalty_start": 1.0,
        },
        "training": _training(1_281_147, 45, 24, 24, warmup_epochs=1),
    },
    "nvae-celeba-256": {"model": {**_LARGE, **_width(30)}, "training": _CELEBA_256},
    "nvae-celeba-256-small": {"model": {**_LARGE, **_width(24)}, "training": _CELEBA_256},
    "nvae-ffhq-256": {
        "model": {**_LARGE, **_width(30), "weight_penalty": 1e-1},
        "training": _training(63_000, 200, 4, 24, rate=8e-3),
    },
    # minutes of two CPU cores
    "nvae-demo": {
        "model": {
            "resolution": 32, "groups": (4, 2), "latent_channels": 8, **_width(16), "blocks": 1, "block_cells": 1,
            "decoder_block_cells": 1, "encoder_cells": 1, "decoder_cells": 1, "mixtures": 5,
        },
        "training": _training(2000, 10, 16, 1, warmup_epochs=1),
    },
    # the 64x64 emoji, an hour of one CPU core; its bundle takes 6 MB
    "nvae-emoji": {
        "model": {
            "resolution": 64, "groups": (5, 3, 2), "latent_channels": 8, **_width(8), "blocks": 2, "block_cells": 1,
            "decoder_block_cells": 1, "encoder_cells": 1, "decoder_cells": 1, "mixtures": 5, "flows": 1,
        },
        "training": _training(3000, 14, 16, 1, warmup_epochs=1),
    },
}  # fmt: skip

# of a few hundred kilobytes, with every part that others have
TINY: dict[str, Any] = {
    "model": {
        "resolution": 8, "groups": (2, 1), "latent_channels": 2, **_width(4), "blocks": 1, "block_cells": 1,
        "decoder_block_cells": 1, "encoder_cells": 1, "decoder_cells": 1, "mixtures": 2, "flows": 1,
    },
    "training": _training(24, 10, 4, 1, warmup_epochs=1, warmup_images=0, init_images=4),
}  # fmt: skip
