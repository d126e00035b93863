"""Named settings: the published models (spec section 4), and two for a CPU."""

from typing import Any

__all__ = ["PRESETS", "TINY"]

_RATE, _BETA = 2.5e-3, 0.99
_LAZY = {"generator": 4 / 5, "discriminator": 16 / 17}  # n / (n + 1), with a penalty every n steps


def _training(batch: int, half_life: float, rate: float = _RATE, **changes: Any) -> dict[str, Any]:
    """The published recipe: Adam without a first moment, rates corrected for penalties that are not of every step."""
    return {
        "batch_size": batch,
        "accumulate": 1,
        "images": 25_000_000,
        "optimizer": "adam",
        "learning_rates": {name: rate * lazy for name, lazy in _LAZY.items()},
        "optimizers": {name: {"betas": (0.0, _BETA**lazy)} for name, lazy in _LAZY.items()},
        "decay_start_images": 25_000_000,
        "grad_clip": None,
        "ema_half_life_images": half_life,
        "ema_ramp": 0.05,
        "ema_warmup_images": 0,
        "added_noise_std": 0.0,
        "flip": True,
        "init_images": 1,  # nothing is made of them
        **changes,
    }


_LOW = {"const": 128, "diagonal": True}
_HIGH = {"const": 64, "random": 32}
_EXTRA = {128: 1, 256: 1}


def _published(**changes: Any) -> dict[str, Any]:
    """256x256 on four processes of 16 images."""
    embeddings = {32: _LOW, 64: _LOW, 128: _HIGH, 256: _HIGH}
    return {
        "model": {"resolution": 256, "embeddings": embeddings, "extra_layers": _EXTRA, **changes},
        "training": _training(16, 20_000),
    }


PRESETS: dict[str, dict[str, Any]] = {
    "inrgan-256": _published(),
    "inrgan-bil-256": _published(upsampling="bilinear"),
    # without further layers, as for LSUN churches
    "inrgan-256-small": _published(extra_layers={}),
    "inrgan-bil-256-small": _published(upsampling="bilinear", extra_layers={}),
    # 32x32, minutes on two CPU cores
    "inrgan-demo": {
        "model": {
            "resolution": 32, "input_side": 8, "z_dim": 64, "w_dim": 64, "rank": 4, "channel_max": 64,
            "embeddings": {
                8: {"const": 16, "diagonal": True}, 16: {"const": 16, "diagonal": True},
                32: {"const": 16, "random": 8},
            },
            "discriminator": {"channel_base": 1024, "channel_max": 128}, "r1_gamma": 1.0, "augment": "bgc",
            "augment_images": 50_000,  # a short run would end before it had adapted
        },
        "training": _training(16, 5_000, images=100_000, decay_start_images=100_000),
    },
    # the 64x64 emoji, hours of one CPU core
    "inrgan-emoji": {
        "model": {
            "resolution": 64, "input_side": 16, "upsampling": "bilinear", "z_dim": 128, "w_dim": 128, "rank": 6,
            "channel_base": 4096, "channel_max": 128, "extra_layers": {64: 1},
            "embeddings": {
                16: {"const": 64, "diagonal": True}, 32: {"const": 64, "diagonal": True},
                64: {"const": 32, "random": 16},
            },
            "discriminator": {"channel_base": 2048, "channel_max": 128}, "r1_gamma": 1.0, "augment": "bgc",
            "augment_images": 100_000,
        },
        "training": _training(16, 5_000, images=1_000_000, decay_start_images=1_000_000),
    },
}  # fmt: skip

# of a few ten thousand numbers, with every part that others have
TINY: dict[str, Any] = {
    "model": {
        "resolution": 16, "input_side": 8, "upsampling": "bilinear", "z_dim": 8, "w_dim": 8,
        "classes": ("cat", "dog"), "rank": 2, "channel_max": 8, "extra_layers": {16: 1},
        "embeddings": {8: {"const": 4, "diagonal": True}, 16: {"const": 3, "random": 2}}, "psi": 0.5,
        "discriminator": {"channel_base": 128, "channel_max": 8, "group": 2}, "r1_every": 2,
        "path_weight": 2.0, "path_every": 1, "style_mixing": 0.9, "augment": "bgc", "augment_start": 0.5,
        "augment_images": 400, "augment_every": 2,
    },
    "training": _training(4, 20, images=400),
}  # fmt: skip
