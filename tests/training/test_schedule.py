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


def test_due_counts_every_multiple_once() -> None:
    passed = [after for after in range(6, 61, 6) if is_due(10, after - 6, after)]
    assert passed == [12, 24, 30, 42, 54, 60]  # the first step at or after 10, 20, 30, 40, 50, 60
