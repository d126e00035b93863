"""Learning rates as a function of the images seen, so that they do not depend on the size of the dataset."""

import math

from hflow_rt.training.config import TrainingConfig

__all__ = ["is_due", "learning_rates"]


def learning_rates(config: TrainingConfig, images: int) -> dict[str, float]:
    """The rate of each parameter group for a step that starts after `images`.

    Rates grow linearly over the first `warmup_images`. After `decay_start_images`, rates change every
    `decay_every_images`: in steps they are multiplied by the group's factor; along half a cosine they fall to the
    group's final rate, which holds for the last `decay_every_images` before the end. From `cut_images` on a rate is 0.
    """
    warmth = min(1.0, images / config.warmup_images) if config.warmup_images else 1.0
    passed = max(0, (images - config.decay_start_images) // config.decay_every_images)

    def rate_of(group: str, rate: float) -> float:
        if group in config.cut_images and images >= config.cut_images[group]:
            return 0.0
        if config.decay == "steps":
            return float(warmth * rate * config.decay_factors.get(group, 1.0) ** passed)
        end = config.images if config.decay_end_images is None else config.decay_end_images
        periods = max(1, math.ceil((end - config.decay_start_images) / config.decay_every_images) - 1)
        share = (1 + math.cos(math.pi * min(1.0, passed / periods))) / 2
        final = config.final_rates.get(group, 0.0)
        return warmth * (final + (rate - final) * share)

    return {group: rate_of(group, rate) for group, rate in config.learning_rates.items()}


def is_due(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
