"""Named settings: the paper's models, with its learned priors, and a small one for a CPU (spec section 5)."""

from typing import Any

__all__ = ["PRESETS", "TINY"]


def _training(batch: int, epoch: int, **changes: Any) -> dict[str, Any]:
    """The paper's recipe: Adamax at 1e-3 after ten epochs of warm-up, an average over about one epoch (spec 6)."""
    return {
        "batch_size": batch,
        "accumulate": 1,
        "images": 2000 * epoch,
        "optimizer": "adamax",
        "learning_rates": {"flow": 1e-3},
        "warmup_images": 10 * epoch,
        "decay_start_images": 2000 * epoch,
        "grad_clip": 100.0,
        "ema_weight": batch / epoch,
        "ema_warmup_images": epoch,
        "added_noise_std": 0.0,
        "init_images": 256,
        **changes,
    }


_GLOW_32 = {"resolution": 32, "levels": 3, "steps": 32, "lu": True}

PRESETS: dict[str, dict[str, Any]] = {
    # ImageNet 64x64
    "glow-64": {
        "model": {"resolution": 64, "levels": 4, "steps": 48, "lu": True},
        "training": _training(16, 50_000),
    },
    # CelebA-HQ at 5 bits
    "glow-256": {
        "model": {"resolution": 256, "levels": 6, "steps": 32, "lu": True, "coupling": "additive", "bits": 5},
        "training": _training(8, 27_000, init_images=64),
    },
    "glow-256-affine": {
        "model": {"resolution": 256, "levels": 6, "steps": 32, "lu": True, "bits": 5},
        "training": _training(8, 27_000, init_images=64),
    },
    "glow-cifar": {"model": _GLOW_32, "training": _training(64, 50_000)},
    # any images; the paper takes 48 steps for ImageNet 32x32
    "glow-32": {"model": _GLOW_32, "training": _training(64, 250_000)},
    # Minutes instead of days. An affine model so little trained divides by multipliers near 0 where a sample leaves
    # what it knows, and overflows; an additive one takes half a bit more and draws at any std. Its activations are
    # small, and keeping them makes steps 1.4 times as fast.
    "glow-demo": {
        "model": {
            "resolution": 32,
            "levels": 3,
            "steps": 8,
            "hidden_channels": 64,
            "lu": True,
            "coupling": "additive",
        },
        "training": _training(
            16,
            1000,
            images=100_000,
            warmup_images=2000,
            decay_start_images=60_000,
            decay_every_images=4000,
            decay_factors={"flow": 0.8},
            ema_weight=0.02,
        ),
    },
    # the 64x64 emoji, two hours of one CPU core; additive for the same reason
    "glow-emoji": {
        "model": {
            "resolution": 64,
            "levels": 4,
            "steps": 10,
            "hidden_channels": 88,
            "lu": True,
            "coupling": "additive",
        },
        "training": _training(
            16,
            3157,
            images=90_000,
            warmup_images=3000,
            decay_start_images=60_000,
            decay_every_images=3000,
            decay_factors={"flow": 0.8},
            ema_weight=0.01,
        ),
    },
}

# of a few kilobytes, with every part that others have
TINY: dict[str, Any] = {
    "model": {"resolution": 16, "levels": 2, "steps": 1, "hidden_channels": 8, "lu": True, "classes": ("a", "b")},
    "training": _training(4, 40, init_images=8),
}
