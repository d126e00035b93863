import pytest
import torch

from hflow_rt.models.checkpoint import build_model
from hflow_rt.models.plan import Place
from hflow_rt.training.config import load_config
from hflow_rt.training.ema import average_weight, averaged_copy, update_average


def test_average_moves_by_its_weight_and_buffers_are_copied() -> None:
    model = build_model("toy", {})
    average = averaged_copy(model)
    before = {name: value.clone() for name, value in average.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
        model.spread.fill_(7)
    update_average(average, model, 0.25)
    for name, value in average.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.25)
    assert average.spread.item() == 7
    update_average(average, model, 1)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), model.parameters(), strict=True))


def test_average_is_apart_from_the_model_and_needs_no_gradient() -> None:
    model = build_model("toy", {})
    average = averaged_copy(model)
    assert not average.training
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_how_much_new_weights_count() -> None:
    """With steps of 8 images: as set, growing like 9 / (10 + n), and by half-life with and without a ramp."""

    def weights(*changes: str, steps: tuple[int, ...] = (1, 2, 100, 1000)) -> list[float]:
        overrides = ["training.ema_warmup_images=0", *(f"training.{change}" for change in changes)]
        config = load_config("toy", overrides=overrides).training
        return [average_weight(config, Place(step, 8 * step), 8) for step in steps]

    assert weights() == [0.1] * 4
    assert weights("ema_warmup_images=16") == [1, 1, 0.1, 0.1]
    decays = [min(0.99, (1 + n) / (10 + n)) for n in (1, 2, 100, 1000)]
    assert weights("ema_growing=true", "ema_weight=0.01") == pytest.approx([1 - decay for decay in decays])
    assert weights("ema_half_life_images=400") == pytest.approx([1 - 0.5 ** (8 / 400)] * 4)
    ramp = [1, *(1 - 0.5 ** (8 / min(400, 0.05 * 8 * (n - 1))) for n in (2, 100, 1000))]
    assert weights("ema_half_life_images=400", "ema_ramp=0.05") == pytest.approx(ramp)
