import math
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.evaluation.bits import bits_figures, bits_per_dim
from hflow_rt.evaluation.figures import Evaluation
from hflow_rt.models.family import Bound, LatentModel
from hflow_rt.streams import generator


class UniformModel(torch.nn.Module):
    """Stands in for a family: 8 bits plus a uniform draw; what it published is the mean of the pixels."""

    resolution, channels = 4, 3
    conditions, noise_scales = LatentModel.conditions, LatentModel.noise_scales

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.bounded = True
        self.value = 0.0

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"z": (48,)}

    def bounds(self) -> dict[str, Bound]:
        return {"strict": Bound("strict bound", "upper"), "paper": Bound("paper's bound", "published")}

    def bound_features(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    def bound_inputs(self, bound: str, pixels: torch.Tensor, generator: torch.Generator, conditions: Any) -> Any:
        assert not self.training
        if bound == "paper":
            return {"bits": pixels.float().mean((1, 2, 3))}
        if not self.bounded:
            raise ConfigError("no bound here")
        return {"bits": 8 + torch.rand(len(pixels), generator=generator) + self.value}

    def bound_terms(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert not self.training
        return {"image.bits": inputs["bits"] + self.weight}


@pytest.fixture
def model() -> Any:
    return UniformModel().train()


def strict_bits(model: Any, pixels: Any, **settings: int) -> Any:
    return bits_per_dim(model, pixels, **settings).bounds["strict"].total


PIXELS = np.arange(10 * 48, dtype=np.uint32).astype(np.uint8).reshape(10, 3, 4, 4)


def test_strict_bits_are_a_mean_with_its_error(model: Any) -> None:
    found = strict_bits(model, PIXELS, seed=1, draws=1, batch=4)
    uniform = [torch.rand(1, generator=generator(1, 0, 0, index)) for index in range(10)]
    assert found.mean == pytest.approx(8 + float(torch.cat(uniform).mean()), rel=1e-6)
    assert 8.2 < found.mean < 8.8
    assert found.n == 10
    assert found.standard_error == pytest.approx(math.sqrt(1 / 12 / 10), rel=0.6)
    assert model.training  # as it was before


def test_strict_bits_are_deterministic_and_draws_average(model: Any) -> None:
    first = strict_bits(model, PIXELS, seed=1, batch=4)
    torch.rand(3)  # whatever the default generator does
    assert strict_bits(model, PIXELS, seed=1, batch=4) == first
    assert strict_bits(model, PIXELS, seed=1, batch=3) == first  # an image's draws are its own
    assert strict_bits(model, PIXELS, seed=2, batch=4) != first
    many = strict_bits(model, PIXELS, seed=1, draws=400, batch=4)
    assert many.mean == pytest.approx(8.5, abs=0.02)
    assert many.standard_error < first.standard_error / 5


def test_one_image_has_no_error_and_survives_json(model: Any) -> None:
    found = bits_figures(model, PIXELS[:1], 7)
    assert math.isnan(found.figures["strict"].estimate.standard_error)
    assert found.dump()["figures"]["strict"]["standard_error"] is None
    assert Evaluation.load(found.dump()) == found


def test_evaluations_of_before_are_read() -> None:
    former = {"images": 7, "strict": 3.5, "standard_error": 0.25, "held_out": 6, "paper": 3.25, "reason": None}
    found = Evaluation.load(former)
    assert found.quoted == ("strict bound", (3.5, 0.25, 6), "bits/dim")
    assert found.figures["paper"][:2] == ("paper's bound", (3.25, math.nan, 6))
    assert Evaluation.load(found.dump()) == found
    found = Evaluation.load(former | {"strict": None, "standard_error": None, "reason": "z1 has no noise"})
    assert (list(found.figures), found.reasons) == (["paper"], {"strict": "z1 has no noise"})
    found = Evaluation.load(former | dict.fromkeys(("strict", "paper")) | {"held_out": 0, "reason": "no images"})
    assert found == Evaluation(7, reason="no images")


def test_paper_bits_weight_a_last_small_batch_rightly(model: Any) -> None:
    assert bits_figures(model, PIXELS, 0, batch=4).figures["paper"].estimate.mean == pytest.approx(PIXELS.mean())


def test_what_cannot_be_computed_is_absent_with_the_reason(model: Any) -> None:
    assert bits_figures(model, PIXELS[:0], 0).reason == "there are no held-out images"
    model.bounded = False
    found = bits_figures(model, PIXELS, 0)
    assert (list(found.figures), found.reasons) == (["paper"], {"strict": "no bound here"})
    model.bounded, model.value = True, math.inf
    found = bits_figures(model, PIXELS, 0)
    assert (list(found.figures), found.reasons) == (["paper"], {"strict": "it is not finite on 10 of 10 images"})
    with torch.no_grad():
        model.weight.fill_(math.nan)
    assert bits_figures(model, PIXELS, 0).figures == {}
    model.bounds = dict
    assert bits_figures(model, PIXELS, 0) == Evaluation(0, reason="models of this family have no likelihood")
    with pytest.raises(ConfigError, match="models of this family have no likelihood; use 'hflow-rt eval distance'"):
        bits_per_dim(model, PIXELS)


def test_likelihoods_of_draws_are_averaged(model: Any) -> None:
    """The importance-weighted bound: of each image the logarithm of the mean of 2^(-bits D) over the draws."""
    model.bounds = lambda: {"strict": Bound("mean", "upper"), "weighted": Bound("weighted", "upper", "logmeanexp")}
    found = bits_per_dim(model, PIXELS, seed=1, draws=5, batch=4)
    drawn = [[8 + float(torch.rand(1, generator=generator(1, 1, k, i))) for i in range(10)] for k in range(5)]
    bits = np.float64(drawn) * 48
    expected = -np.log2(np.exp2(-bits).mean(0)) / 48
    assert (expected < bits.mean(0) / 48 - 0.05).all()  # a bound that is better by more than rounding
    assert found.bounds["weighted"].total.mean == pytest.approx(expected.mean(), rel=1e-6)
    (image,) = found.bounds["weighted"].latents
    assert list(image.parts) == ["bits", "weighting"]
    assert image.parts["bits"].mean == pytest.approx(bits.mean() / 48, rel=1e-6)
    assert image.total == found.bounds["weighted"].total
    assert list(found.bounds["strict"].latents[0].parts) == ["bits"]
    one = bits_per_dim(model, PIXELS, seed=1, batch=4).bounds["weighted"].latents[0].parts
    assert one["weighting"].mean == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("pixels", [PIXELS[:0], PIXELS[:, :, :2], PIXELS.astype(np.float32)])
def test_wrong_images_are_named(model: Any, pixels: Any) -> None:
    with pytest.raises(DataError, match=r"uint8 images \[n, 3, 4, 4\], n >= 1; found"):
        bits_per_dim(model, pixels)
