import math

import pytest

from hflow_rt.training.config import load_config
from hflow_rt.training.schedule import is_due, learning_rates


# decay from 80 images on, every 80; encoders halve and stop at 240; decoders have no factor
@pytest.mark.parametrize(
    ("images", "encoders", "flows"),
    [
        (0, 1e-3, 5e-3),
        (80, 1e-3, 5e-3),
        (159, 1e-3, 5e-3),
        (160, 5e-4, 5e-3 * 0.9),
        (239, 5e-4, 5e-3 * 0.9),
        (240, 0.0, 5e-3 * 0.81),
        (10_000, 0.0, 5e-3 * 0.9**124),
    ],
)
def test_rates_follow_the_images(images: int, encoders: float, flows: float) -> None:
    rates = learning_rates(load_config("toy").training, images)
    assert rates == pytest.approx({"encoders": encoders, "decoders": 2e-3, "flows": flows})


def test_rates_warm_up() -> None:
    config = load_config("toy", overrides=["training.warmup_images=160"]).training
    plain = load_config("toy").training
    for images, share in ((0, 0.0), (40, 0.25), (120, 0.75), (160, 1.0), (1000, 1.0)):
        expected = {name: share * rate for name, rate in learning_rates(plain, images).items()}
        assert learning_rates(config, images) == pytest.approx(expected)


def test_a_cosine_by_epochs_ends_at_the_final_rates() -> None:
    """Two epochs of 80 images before it and five of it: a recursion over the epochs, the last at the final rate."""
    changes = ["decay=cosine", "decay_start_images=80", "images=480", "final_rates.flows=1e-3", "cut_images={}"]
    config = load_config("toy", overrides=[f"training.{change}" for change in changes]).training
    flows, encoders = 5e-3, 1e-3
    for epoch in range(6):
        j, last = epoch - 1, 6 - 1 - 1
        if j >= 1:
            ratio = (1 + math.cos(math.pi * j / last)) / (1 + math.cos(math.pi * (j - 1) / last))
            flows, encoders = 1e-3 + (flows - 1e-3) * ratio, encoders * ratio
        for images in (80 * epoch, 80 * epoch + 79):
            found = learning_rates(config, images)
            assert (found["flows"], found["encoders"]) == pytest.approx((flows, encoders), abs=1e-12)
    assert flows == pytest.approx(1e-3)
    shorter = config.model_copy(update={"decay_end_images": 240})
    assert learning_rates(shorter, 160)["flows"] == learning_rates(shorter, 10_000)["flows"] == pytest.approx(1e-3)


def test_due_counts_every_multiple_once() -> None:
    passed = [after for after in range(6, 61, 6) if is_due(10, after - 6, after)]
    assert passed == [12, 24, 30, 42, 54, 60]  # the first step at or after 10, 20, 30, 40, 50, 60
