"""Learning rates as a function of the images seen, so that they do not depend on the size of the dataset."""

from hflow_rt.training.config import TrainingConfig

__all__ = ["is_due", "learning_rates"]


def learning_rates(config: TrainingConfig, images: int) -> dict[str, float]:
    """The rate of each parameter group for a step that starts after `images`.

    Rates grow linearly over the first `warmup_images`. A rate is multiplied by the group's factor at
    `decay_start_images + decay_every_images` and every `decay_every_images` after that; from `cut_images` on it is 0.
    """
    warmth = min(1.0, images / config.warmup_images) if config.warmup_images else 1.0
    decays = max(0, (images - config.decay_start_images) // config.decay_every_images)
    return {
        group: 0.0
        if group in config.cut_images and images >= config.cut_images[group]
        else warmth * rate * config.decay_factors.get(group, 1.0) ** decays
        for group, rate in config.learning_rates.items()
    }


def is_due(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
