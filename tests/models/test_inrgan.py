"""INR-GAN beyond the contract: sizes as published, independent pixels, truncation, folding, what trains."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hflow_rt.errors import ConfigError
from hflow_rt.export.bundle import export_bundle
from hflow_rt.models.checkpoint import parse_config, save_model, skeleton
from hflow_rt.models.inrgan import FAMILY
from hflow_rt.models.inrgan.augment import PIPES, Augmenter
from hflow_rt.models.inrgan.config import INRGANConfig
from hflow_rt.models.inrgan.discriminator import Discriminator
from hflow_rt.models.inrgan.layers import grid
from hflow_rt.models.inrgan.losses import slope
from hflow_rt.models.inrgan.model import INRGAN
from hflow_rt.models.inrgan.plan import INRGANPlan, adapted
from hflow_rt.models.inrgan.presets import PRESETS, TINY
from hflow_rt.models.plan import Batch, draw
from hflow_rt.models.registry import Family
from hflow_rt.runtime import load
from hflow_rt.training.config import TrainingConfig


def config(**changes: Any) -> INRGANConfig:
    return INRGANConfig(**{**TINY["model"], **changes})


def model(**changes: Any) -> INRGAN:
    """In float64, with nothing at zero."""
    torch.manual_seed(0)
    made = INRGAN(config(**changes)).double().requires_grad_(False)
    for tensor in (*made.parameters(), made.w_avg):
        if tensor.abs().max() == 0:
            tensor.data = torch.randn(tensor.shape, dtype=tensor.dtype)
    return made


def labels(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.eye(2, dtype=dtype).repeat(count, 1)[:count]


def test_sizes_are_the_published_ones() -> None:
    sizes = {}
    for name in PRESETS:
        made = skeleton("inrgan", PRESETS[name]["model"])
        assert isinstance(made, INRGAN)
        with torch.device("meta"):
            judge = Discriminator(made.config)
        counts = (sum(p.numel() for p in network.parameters()) for network in (made, judge))
        sizes[name] = (*counts, made.config.slots)
    assert sizes == {
        "inrgan-256": (72_436_573, 28_864_129, 16),
        "inrgan-bil-256": (72_436_573, 28_864_129, 16),
        "inrgan-256-small": (68_414_429, 28_864_129, 14),
        "inrgan-bil-256-small": (68_414_429, 28_864_129, 14),
        "inrgan-demo": (333_948, 871_585, 8),
        "inrgan-emoji": (2_326_671, 1_183_137, 11),
    }


def test_embeddings_of_the_published_models() -> None:
    published = INRGANConfig(**PRESETS["inrgan-256"]["model"])
    waves = {side: own.waves(side) - own.random for side, own in published.embeddings.items()}
    assert waves == {32: 20, 64: 24, 128: 14, 256: 16}
    channels = {side: own.channels(side) for side, own in published.embeddings.items()}
    assert channels == {32: 168, 64: 176, 128: 156, 256: 160}


def test_the_bottom_row_is_at_minus_one() -> None:
    x, y = grid(4)
    assert x[0].tolist() == [-1, -0.5, 0, 0.5]
    assert y[:, 0].tolist() == [0.5, 0, -0.5, -1]


def test_rates_are_corrected_for_lazy_penalties() -> None:
    training = PRESETS["inrgan-256"]["training"]
    assert training["learning_rates"] == pytest.approx({"generator": 2e-3, "discriminator": 2.353e-3}, rel=1e-4)
    second = {name: own["betas"][1] for name, own in training["optimizers"].items()}
    assert second == pytest.approx({"generator": 0.99199, "discriminator": 0.99059}, abs=5e-6)


def test_rows_of_generated_weights_have_length_one() -> None:
    made = model()
    layer = made.synthesis.stages[-1].layers[0]
    rows = layer.weights(torch.randn(3, 8, dtype=torch.float64)).norm(dim=2)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-6)


def test_pixels_are_independent() -> None:
    """Whole 2x2 cells of a finer grid may change places in the nearest variant; bilinear looks at neighbours."""

    def shuffled(x: Tensor, side: int) -> Tensor:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        cell = side // 8
        cells = x.unflatten(3, (8, cell)).unflatten(2, (8, cell)).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)
        return cells[:, :, order].unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)

    w = torch.randn(1, 7, 8, dtype=torch.float64)
    for upsampling, same in (("nearest", True), ("bilinear", False)):
        made = model(upsampling=upsampling)
        before = [x for x, _ in made.synthesis.walk(w)]
        for stage in made.synthesis.stages:
            if stage.embedding is not None:
                found = shuffled(stage.embedding(), stage.embedding.side)
                stage.embedding.forward = lambda _, found=found: found  # type: ignore[method-assign]
        after = [x for x, _ in made.synthesis.walk(w)]
        torch.testing.assert_close(after[1], shuffled(before[1], 8))
        assert torch.allclose(after[2], shuffled(before[2], 16)) == same


def test_truncation() -> None:
    made = model(classes=())
    w = made.slots(made.mapping(torch.randn(2, 8, dtype=torch.float64)))
    psi = torch.tensor([1.0, 0.0], dtype=torch.float64)
    all_slots, none, three = (torch.full((2,), count, dtype=torch.float64) for count in (7.0, 0.0, 3.0))
    whole, partial = made.truncated(w, psi, all_slots), made.truncated(w, psi, three)
    assert torch.equal(whole[0], w[0])
    torch.testing.assert_close(whole[1], made.w_avg.expand(7, -1))
    torch.testing.assert_close(partial[1, :3], made.w_avg.expand(3, -1))
    assert torch.equal(partial[1, 3:], w[1, 3:])
    assert torch.equal(made.truncated(w, psi, none), w)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("classes", [(), ("cat", "dog")])
def test_folding_is_exact(upsampling: str, classes: tuple[str, ...]) -> None:
    """Split first layers, spreads in weights, one product for all styles: the same function as the model."""
    made = model(upsampling=upsampling, classes=classes)
    draw = torch.Generator().manual_seed(2)
    z = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    w = torch.randn(3, 7, 8, generator=draw, dtype=torch.float64)
    controls = torch.tensor([1.0, 0.7, 0.2]).double(), torch.tensor([7.0, 4.0, 7.0]).double()
    told = (labels(3),) if classes else ()
    given = {"forward": (z, *controls, *told), "mapping": (z, *told), "synthesis": (w, *controls)}
    for name, spec in made.graphs().items():
        (expected,) = spec.reference(*given[name])
        (single,) = copy.deepcopy(spec.reference).float()(*(value.float() for value in given[name]))
        (found,) = spec.module(*(value.float() for value in given[name]))
        assert found.dtype == torch.float32
        error = (single.double() - expected).abs().max().item()
        assert (found.double() - expected).abs().max().item() <= 4 * error + 1e-6
        assert expected.std() > 0.05


def test_the_middle_of_the_prior_survives_export(tiny: Callable[[Family], Any], tmp_path: Path) -> None:
    """z of zeros is divided by almost nothing, which an exporter could take for nothing."""
    made = tiny(FAMILY)
    save_model(tmp_path / "model.safetensors", "inrgan", made, made.state_dict(), {})
    export_bundle(tmp_path / "model.safetensors", tmp_path / "bundle", np.zeros((1, 3, 16, 16), np.float32))
    z = np.zeros((2, 8), np.float32)
    z[1, 0] = 1e-4
    told = labels(2).float()
    with load(tmp_path / "bundle") as session:
        w = session.into_space("w", {"z": z, "labels": told.numpy()})["w"]
    expected = copy.deepcopy(made).double().mapping(torch.from_numpy(z).double(), told.double())
    np.testing.assert_allclose(w[:, 0], expected.detach().numpy(), atol=1e-5)


def test_groups_of_images_are_formed_by_stride() -> None:
    judge = Discriminator(config(classes=()))
    x = torch.tensor([0.0, 1.0, 4.0, 1.0])[:, None, None, None].expand(-1, 3, 4, 4)
    found = judge._with_spread(x)[:, -1, 0, 0]
    torch.testing.assert_close(found, torch.tensor([2.0, 1e-4, 2.0, 1e-4]))
    with pytest.raises(ConfigError, match=r"multiple of discriminator\.group = 2, not 3"):
        judge(torch.zeros(3, 3, 16, 16))


def test_slope_is_the_gradient_and_has_one() -> None:
    torch.manual_seed(0)
    judge = Discriminator(config(classes=())).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    step = 1e-6 * torch.randn_like(images)
    with torch.no_grad():
        change = judge(images + step).sum() - judge(images - step).sum()
    at = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(judge(at).sum(), at)
    assert change.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-5)
    found = slope(judge, images)
    torch.testing.assert_close(found, gradient.square().sum((1, 2, 3)))
    weight = judge.from_colours.weight
    (second,) = torch.autograd.grad(found.sum(), weight)
    direction = torch.randn_like(weight)
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-6 * direction
        sums.append(slope(judge, images).sum().item())
        with torch.no_grad():
            weight -= sign * 1e-6 * direction
    assert (sums[0] - sums[1]) / 2e-6 == pytest.approx((second * direction).sum().item(), rel=1e-4)


def drawn(augmenter: Augmenter, count: int) -> dict[str, Tensor]:
    return draw(augmenter.draws(), count, torch.Generator().manual_seed(3))


def test_augmentation_is_twice_differentiable() -> None:
    augmenter = Augmenter(PIPES["bgcfnc"], 3, 24)
    draws = {name: value.double() for name, value in drawn(augmenter, 1).items()}
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64, requires_grad=True)

    def seen(x: Tensor) -> Tensor:
        return augmenter(x, torch.tensor(1.0), draws).square().mean((2, 3))

    assert torch.autograd.gradgradcheck(seen, images, fast_mode=True)


def test_what_does_not_fire_changes_nothing() -> None:
    augmenter = Augmenter(PIPES["bgcfnc"], 3, 24)
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6), 24, mode="bicubic")
    draws = drawn(augmenter, 4)
    torch.testing.assert_close(augmenter(images, torch.tensor(0.0), draws), images, rtol=0, atol=1e-5)
    fired = augmenter(images, torch.tensor(0.5), draws)
    assert (fired - images).abs().amax((1, 2, 3)).min() > 1e-2


def test_augmentation_fires_as_often_as_it_should() -> None:
    """A flip is one half of the times it fires; rotations fire once or twice with probability p."""
    images = torch.zeros(4000, 1, 4, 4)
    images[:, :, 0, 0] = 1.0
    augmenter = Augmenter(("brightness",), 1, 4)
    brighter = augmenter(images, torch.tensor(0.3), drawn(augmenter, 4000))[:, 0, 3, 3] != 0
    assert brighter.float().mean().item() == pytest.approx(0.3, abs=0.03)
    augmenter = Augmenter(("xflip",), 1, 4)
    flipped = augmenter(images, torch.tensor(0.8), drawn(augmenter, 4000))[:, 0, 0, 3] > 0.5
    assert flipped.float().mean().item() == pytest.approx(0.4, abs=0.03)


def test_the_probability_follows_the_discriminator() -> None:
    p = torch.tensor(0.25)
    assert adapted(p, 0.9, 0.6, 0.125) == 0.375
    assert adapted(p, 0.2, 0.6, 0.125) == 0.125
    assert adapted(p, 0.6, 0.6, 0.125) == 0.25
    assert adapted(p, -1.0, 0.6, 0.5) == 0


def test_a_discriminator_that_wins_is_told_with_what_to_do() -> None:
    plan = INRGANPlan(INRGAN(config(augment="none", r1_gamma=2.0)))
    assert plan.warning({"loss": 5.0, "discriminator/loss": 0.2}) is None
    assert plan.warning({}) is None
    line = plan.warning({"discriminator/loss": 0.031})
    assert line is not None
    assert line.startswith("the discriminator wins: its loss is 0.031, where 1.39 is even; images get no better")
    assert "model.augment=bgc (--from), raise model.r1_gamma = 2" in line
    plan = INRGANPlan(INRGAN(config()))
    plan.p.fill_(0.99)
    assert plan.warning({"discriminator/loss": 0.5}) is None
    plan.p.fill_(1.0)
    line = plan.warning({"discriminator/loss": 0.5})
    assert line is not None
    assert "augmentation is at its most, p = 1, and does not suffice; " in line
    assert "model.augment" not in line


def test_styles_are_mixed_from_a_slot_on() -> None:
    """In so many micro-batches, and only the first z moves the running mean."""
    made = INRGAN(config(style_mixing=0.5, classes=()))
    plan = INRGANPlan(made)
    z, z2 = torch.randn(2, 3, 8)
    one, other = (made.slots(made.mapping(value)) for value in (z, z2))
    for chance, where, first in ((0.6, 0.0, 7), (0.4, 0.0, 1), (0.4, 0.5, 4), (0.4, 0.99, 6)):
        before = made.w_avg.clone()
        draws = {"z": z, "z2": z2, "mix": torch.tensor([[chance, where]]).expand(3, 2)}
        found = plan.styles(Batch(torch.zeros(3), draws, {}))
        assert torch.equal(found, torch.cat([one[:, :first], other[:, first:]], 1))
        torch.testing.assert_close(made.w_avg, before.lerp(one[:, 0].mean(0), 0.005))


def test_a_micro_batch_is_whole_groups() -> None:
    made = INRGAN(config())
    settings = {"learning_rates": {}}
    made.plan(TrainingConfig(batch_size=6, **settings))
    with pytest.raises(ConfigError, match=r"multiple of discriminator\.group = 2, not 5"):
        made.plan(TrainingConfig(batch_size=5, **settings))


def test_only_the_generator_ships() -> None:
    made = INRGAN(config())
    plan = INRGANPlan(made)
    assert not [name for name in made.state_dict() if "discriminator" in name]
    trained = [p for groups in plan.groups().values() for group in groups.values() for p in group]
    assert {id(p) for p in trained} == {id(p) for p in plan.parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 24}, "resolution must be a power of two, not 24"),
        ({"input_side": 32}, "input_side must be at most resolution = 16, not 32"),
        ({"embeddings": {16: {"const": 3}}}, r"embeddings must be of sides \[8, 16\], not \[16\]"),
        ({"extra_layers": {8: 1}}, r"extra_layers must be of sides \[16\], not 8"),
        ({"discriminator": {"group": 3}}, "discriminator: group must be a power of two, not 3"),
        ({"classes": ("cat", "cat")}, "classes must be two different names or more"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(INRGANConfig, TINY["model"] | changes)
