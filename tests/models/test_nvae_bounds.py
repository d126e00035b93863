"""What NVAE tells of images: bounds whose bottom-up half runs once, nats of binary images, pixels that are drawn."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hflow_rt.evaluation.bits import bits_figures, bits_per_dim
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.model import NVAE
from hflow_rt.models.nvae.output import Mixture, draw_specs, pixels
from hflow_rt.models.nvae.presets import TINY

BINARY = {"output": "bernoulli", "bits": 1, "channels": 1}


def make(**changes: Any) -> NVAE:
    torch.manual_seed(1)
    return NVAE(NVAEConfig(**TINY["model"] | changes)).eval().requires_grad_(False)


def photographs(model: NVAE, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *model.config.image_shape), dtype=np.uint8)


def test_features_are_computed_once_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make(), list[int]()
    bottom_up = model.bottom_up

    def counted(image: Tensor) -> list[Tensor]:
        seen.append(len(image))
        return bottom_up(image)

    monkeypatch.setattr(model, "bottom_up", counted)
    found = bits_per_dim(model, photographs(model, 3), draws=4, batch=2)
    assert seen == [2, 1, 2, 1]  # of two bounds
    elbo, importance = (found.bounds[name].total.mean for name in ("elbo", "importance"))
    assert importance < elbo + 0.05  # of other draws


def test_binary_images_are_quoted_in_nats() -> None:
    model = make(**BINARY)
    images = photographs(model, 4)
    bound = bits_per_dim(model, images).bounds["elbo"]
    assert bound.quoted.unit == "nats"
    assert bound.quoted.estimate.mean == pytest.approx(bound.total.mean * 64 * math.log(2))
    assert bound.dump()["nats"]["mean"] == bound.quoted.estimate.mean
    assert bits_figures(model, images, 0).figures["elbo"] == bound.quoted
    assert bits_per_dim(make(), images.repeat(3, 1)).bounds["elbo"].quoted.unit == "bits/dim"


def test_evaluations_tell_how_many_channels_are_in_use() -> None:
    model = make()
    model.posteriors[0].bias[0] = 4.0  # the mean of one channel of the top group is far from the prior's
    model.posteriors[0].bias[2:] = -8.0
    found = bits_figures(model, photographs(model, 5), 0, draws=2).figures
    assert list(found) == ["elbo", "importance", "active1", "active0"]
    assert found["active1"].title == "active channels of z1 (2 of 2 a group, top first)"
    assert found["active1"].estimate.mean == 2
    assert re.fullmatch(r"active channels of z0 \(\d(\+|x)\d of 2 a group, top first\)", found["active0"].title)
    quiet = make(residual_posterior=False, flows=0)
    for sampler in quiet.posteriors:
        sampler.weight.zero_()
        sampler.bias.zero_()
    for prior in quiet.priors:
        prior[1].log_norm.fill_(-20)
        prior[1].bias.zero_()
    report = bits_per_dim(quiet, photographs(quiet, 5))
    assert [figure.estimate.mean for figure in report.figures.values()] == [0, 0]
    assert report.dump()["figures"]["active0"]["title"] == "active channels of z0 (2x0 of 2 a group, top first)"


@pytest.mark.parametrize("changes", [{}, BINARY, {"output": "normal"}, {"channels": 1}])
def test_drawn_pixels_have_the_distribution(changes: dict[str, Any]) -> None:
    """The mean over many draws, where nothing is clipped, is the mean."""
    config = make(**changes).config
    generator = torch.Generator().manual_seed(0)
    logits = 0.3 * torch.randn(1, config.head_channels, 2, 2, generator=generator)
    narrow = 4.0  # logarithms of scales
    if config.output == "normal":
        logits[:, config.channels :] -= narrow
    if config.output == "mixture":
        logits[:, : config.mixtures] *= 5
        rest = logits[:, config.mixtures :].unflatten(1, (config.channels, -1, config.mixtures))
        rest[:, :, 1] -= narrow
    found = pixels(config, logits.expand(4000, -1, -1, -1))
    draws = []
    for spec in draw_specs(config):
        make_one = torch.rand if spec.role == "uniform" else torch.randn
        draws.append(make_one(4000, spec.shape[0], 2, 2, generator=generator))
    images = found.at(draws)
    assert images.shape == (4000, *config.image_shape[:1], 2, 2)
    assert (images.mean(0) - found.mean()[0]).abs().max() < 0.05
    if config.output == "bernoulli":
        assert set(images.unique().tolist()) == {0, 1}
    if config.output == "mixture":
        assert images.std(0).min() > 0.01


def test_a_choice_does_not_turn_on_the_last_bit() -> None:
    """The same numbers in float64 choose the same, in every pixel."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 100, 64, 64, generator=generator)
    draws = [torch.rand(2, channels, 64, 64, generator=generator) for channels in (10, 3)]
    single, double = Mixture(logits).at(draws), Mixture(logits.double()).at([draw.double() for draw in draws])
    assert (single - double).abs().max() < 1e-4
    published = Mixture(logits).draw(1e-5 + (1 - 2e-5) * draws[0], 1e-5 + (1 - 2e-5) * draws[1])
    same = ((single - published).abs() < 1e-4).all(1).float().mean()
    assert 0.99 < same < 1
