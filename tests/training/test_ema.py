import torch

from hflow_rt.models.checkpoint import build_model
from hflow_rt.training.ema import averaged_copy, update_average


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
