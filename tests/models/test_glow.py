"""Glow: sizes, exactness in both directions, log-determinants, folding, initialisation."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.kernels.coupling import coupling
from hflow_rt.layers.actnorm import ActNorm
from hflow_rt.layers.fold import fold_children
from hflow_rt.models.bins import in_bins, public_levels, to_model
from hflow_rt.models.checkpoint import build_model
from hflow_rt.models.glow import coupling as coupling_file
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.folded import FOLDS
from hflow_rt.models.glow.network import Glow
from hflow_rt.models.glow.prior import Gaussian
from hflow_rt.models.registry import family

BASE: dict[str, Any] = {
    "resolution": 8, "levels": 2, "steps": 2, "hidden_channels": 7, "invertible_backward": False,
}  # fmt: skip
REPOSITORY = {
    "edge": "ones", "hidden": "bias", "moving": "first", "scale": "exp_sigmoid", "split_prior": False,
    "top_prior": "fixed",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "lu": {"lu": True},
    "repository": {**REPOSITORY, "lu": True},
    "additive-shuffle": {"coupling": "additive", "permutation": "shuffle", "edge": "zero"},
    "reverse-first": {"permutation": "reverse", "moving": "first", "edge": "ones"},
    "classes": {"classes": ("a", "b", "c"), "classifier": True},
    "classes-fixed": {"classes": ("a", "b", "c"), "top_prior": "fixed", "bits": 5},
}


def make(changes: dict[str, Any], base: dict[str, Any] = BASE) -> Glow:
    """In float64, with nothing left at zero, actnorms fitted to a batch and pushed off it."""
    torch.manual_seed(1)
    model = Glow(GlowConfig(**base, **changes)).double()
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.init_from_batch(torch.rand(16, 3, model.resolution, model.resolution).double() - 0.5)
    for module in model.modules():
        if isinstance(module, ActNorm):
            module.shift.data += 0.1 * torch.randn_like(module.shift)
            module.log_scale.data += 0.1 * torch.randn_like(module.log_scale)
    return model.eval().requires_grad_(False)


def images(count: int, side: int = 8, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)


def conditions(model: Glow, count: int) -> dict[str, Tensor]:
    classes = len(model.config.classes)
    return {"labels": torch.eye(classes).double()[torch.arange(count) % classes]} if classes else {}


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> Glow:
    return make(VARIANTS[request.param])


def test_images_come_back(model: Glow) -> None:
    x = images(5)
    encoding = model.encode(x, conditions(model, 5))
    assert {name: tuple(z.shape[1:]) for name, z in encoding.latents.items()} == model.latent_shapes()
    assert list(model.latent_shapes()) == ["z1", "z0"]
    assert (model.decode(encoding.latents | conditions(model, 5)) - x).abs().max() < 1e-10


def test_latents_come_back(model: Glow) -> None:
    torch.manual_seed(3)
    latents = {name: 0.1 * torch.randn(4, *shape).double() for name, shape in model.latent_shapes().items()}
    decoded = model.decode_model(latents | conditions(model, 4))
    again = model.encode_model(decoded.image, conditions(model, 4).get("labels"))
    for name, z in model.named_latents(again).items():
        assert (z - latents[name]).abs().max() < 1e-9
    for mine, theirs in zip(again.raw, decoded.raw, strict=True):
        assert (mine - theirs).abs().max() < 1e-9


def test_log_det_is_that_of_the_jacobian(model: Glow) -> None:
    """Of the map to raw latents; to deviations the change of variables holds the priors' stds as well."""
    x, labels = images(1, seed=4) - 0.5, conditions(model, 1).get("labels")

    def flat(pixels: Tensor) -> Tensor:
        found = model.encode_model(pixels.view(1, 3, 8, 8), labels)
        return torch.stack([torch.cat([z.flatten() for z in zs]) for zs in (found.raw, found.latents)])

    raw, deviations = torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, x.flatten(), vectorize=True))[1]
    found = model.encode_model(x, labels)
    assert abs(torch.stack([chain.log_det for chain in found.chains]).sum() - raw) < 1e-8
    normal = -0.5 * (flat(x)[1].square() + math.log(2 * math.pi)).sum()
    assert abs(found.log_prob[0] - (normal + deviations)) < 1e-8


def test_both_directions_have_opposite_log_dets(model: Glow) -> None:
    x = images(3)
    chain = model.levels[0].chain
    there = chain.inverse(F.pixel_unshuffle(x, 2))
    back = chain(there.value)
    assert (there.log_det + back.log_det).abs().max() < 1e-10
    assert (there.coupling + back.coupling).abs().max() < 1e-11


def test_folded_is_the_same_map(model: Glow) -> None:
    """In float64, so that nothing but an error of folding can differ."""
    x, given = images(3), conditions(model, 3)
    folded = copy.deepcopy(model)
    fold_children(folded, FOLDS)
    expected, found = model.encode(x, given), folded.encode(x, given)
    for name, z in expected.latents.items():
        assert (found.latents[name] - z).abs().max() < 1e-11
    assert (found.log_prob - expected.log_prob).abs().max() < 1e-9
    torch.manual_seed(5)
    latents = {name: 0.3 * torch.randn(3, *shape).double() for name, shape in model.latent_shapes().items()} | given
    assert (folded.decode_model(latents).image - model.decode_model(latents).image).abs().max() < 1e-11
    drawn = {"image": x, "uniform": images(3, seed=6)} | given
    for name, part in model.bound_terms(drawn).items():
        assert (folded.bound_terms(drawn)[name] - part).abs().max() < 1e-11


@pytest.mark.parametrize("bits", [8, 5])
def test_every_level_comes_back_exactly(bits: int) -> None:
    """InversePass stands at bin centres, so that rounding public values takes the bin, which no small error leaves."""
    model = make({"bits": bits}).float()
    pixels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    public = public_levels(pixels, bits)
    back = model.decode(model.encode(public).latents)
    steps = (1 << bits) - 1
    assert torch.equal((back * steps).round(), (public * steps).round())
    x = model.decode_model(model.encode(public).latents).image
    assert torch.equal(((x + 0.5) * (1 << bits)).floor(), (public * steps).round())
    # 8-bit images of a model of fewer bits come back too
    eight = pixels.float() / 255
    assert torch.equal((model.decode(model.encode(eight).latents) * 255).round(), pixels.float())


def test_bits_have_a_closed_form_where_couplings_are_fresh() -> None:
    """A fresh coupling multiplies by sigmoid(2), a shuffle has no log-determinant, fresh priors are standard."""
    torch.manual_seed(0)
    model = Glow(GlowConfig(**BASE, permutation="shuffle")).double()
    x = images(6) - 0.5
    model.init_from_batch(x)
    found = model.encode_model(x)
    scales = sum(
        step.actnorm.log_scale.sum() * model.config.side(i) ** 2
        for i, level in enumerate(model.levels)
        for step in level.chain.steps
    )
    moved = sum(model.config.steps * 6 * 2**i * model.config.side(i) ** 2 for i in range(2))
    squares = sum(z.flatten(1).square().sum(1) for z in found.raw)
    log_prob = -0.5 * squares - 0.5 * 192 * math.log(2 * math.pi) - scales + moved * math.log(1 / (1 + math.exp(-2)))
    bits = model.loss(x).bits_per_dim
    assert bits is not None
    assert abs(bits - (8 - log_prob.mean() / (192 * math.log(2)))) < 1e-10


def test_actnorms_normalise_the_first_batch() -> None:
    torch.manual_seed(0)
    model = Glow(GlowConfig(**BASE)).double()
    assert not model.initialized
    x = images(32) - 0.5
    model.init_from_batch(x)
    assert model.state_dict()["initialized"] == 1
    step = model.levels[0].chain.steps[0]
    y = step.actnorm.inverse(F.pixel_unshuffle(x, 2))
    assert y.mean((0, 2, 3)).abs().max() < 1e-12
    assert (y.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    hidden = step.coupling.net.conv1(step.mixing.inverse(y)[:, :6])
    assert hidden.mean((0, 2, 3)).abs().max() < 1e-12
    assert (hidden.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_bound_is_minus_log_prob_at_the_drawn_point(model: Glow) -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    given = conditions(model, 4)
    inputs = model.bound_inputs("strict", pixels, torch.Generator().manual_seed(9), given)
    bits = torch.stack(list(model.bound_terms(inputs).values())).sum(0)
    uniform = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(9)).double()
    bins = 1 << model.config.bits
    x = to_model(public_levels(pixels, model.config.bits).double(), model.config.bits) + (uniform - 0.5) / bins
    assert (x - in_bins(pixels, model.config.bits, uniform)).abs().max() < 1e-7  # public images are float32
    found = model.encode_model(x, given.get("labels"))
    expected = model.config.bits - found.log_prob / (192 * math.log(2))
    assert ((bits - expected) / expected).abs().max() < 1e-12
    assert model.loss(x, None, given).bits_per_dim == pytest.approx(float(expected.mean()), rel=1e-12)


def test_densities_do_not_cancel_in_float32() -> None:
    """At this std the sums of squares, of log-stds and of constants are thirty thousand, and their total a hundred."""
    torch.manual_seed(0)
    deviation = torch.randn(2, 6, 64, 64)
    prior = Gaussian(torch.zeros(1), torch.tensor([-0.5 * math.log(2 * math.pi) - 0.5]))
    exact = Gaussian(*(part.double() for part in prior)).log_prob(deviation.double())
    assert exact.abs().max() < 300
    assert (prior.log_prob(deviation) - exact).abs().max() < 5e-4


def test_labels_move_the_top_prior() -> None:
    model, x = make(VARIANTS["classes"]), images(3)
    one, other = torch.eye(3).double()[[0, 0, 0]], torch.eye(3).double()[[1, 1, 1]]
    first, second = model.encode(x, {"labels": one}), model.encode(x, {"labels": other})
    assert (first.latents["z1"] - second.latents["z1"]).abs().max() > 1e-3
    assert torch.equal(first.latents["z0"], second.latents["z0"])
    assert (model.decode(first.latents | {"labels": one}) - x).abs().max() < 1e-10
    terms = model.loss(x - 0.5, None, {"labels": one})
    assert terms.bits_per_dim is not None
    assert terms.loss == pytest.approx(float(terms.bits_per_dim + 0.01 * terms.terms["class"]), abs=1e-12)
    with pytest.raises(DataError, match="labels must be one-hot"):
        model.encode(x)
    with pytest.raises(DataError, match="labels must be one-hot"):
        model.decode(first.latents)


def test_a_cpu_takes_plain_torch(model: Glow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the operator's detours: it is not even called, for small models would feel it."""

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(coupling_file, "coupling", called)
    model.float().requires_grad_()
    given = {name: value.float() for name, value in conditions(model, 2).items()}
    encoding = model.encode(images(2).float(), given)
    for one in (model, model.folded()):
        one.decode(one.encode(images(2).float(), given).latents | given)
    encoding.log_prob.sum().backward()


@pytest.mark.parametrize("inverse", [False, True])
def test_plain_couplings_are_the_operators(model: Glow, inverse: bool) -> None:
    """With the map that follows, number by number."""
    for level in model.levels:
        one = level.chain.steps[0].coupling
        channels, side = 2 * (one.region.high - one.region.low), level.chain.side
        torch.manual_seed(channels)
        x, weight, bias = torch.randn(3, channels, side, side), torch.randn(channels, channels), torch.randn(channels)
        raw = torch.randn(3, channels if one.affine else channels // 2, side, side)
        shift, logits = raw.chunk(2, 1) if one.affine else (raw, None)
        found = one.move(x, one.halves(x), raw, weight, bias, inverse=inverse)
        expected = coupling(x, logits, shift, weight, bias, one.region, inverse=inverse, form=one.form)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_shuffles_are_saved() -> None:
    torch.manual_seed(0)
    first, second = (Glow(GlowConfig(**BASE, permutation="shuffle")) for _ in range(2))
    x = images(2).float()
    assert not torch.equal(first.encode(x).latents["z1"], second.encode(x).latents["z1"])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.encode(x).latents["z1"], second.encode(x).latents["z1"])


def live_parameters(config: GlowConfig) -> int:
    """Of the repository's form, by the formula of spec 5."""
    h, total = config.hidden_channels, 0
    for level in range(config.levels):
        c = config.width(level)
        out = c if config.coupling == "affine" else c // 2
        step = 2 * c + (2 * c * c + c) + (9 * h * c // 2 + h) + (h * h + h) + (9 * h * out + out) + out
        total += config.steps * step
    return total


@pytest.mark.parametrize(
    ("preset", "live"), [("glow-64", 111_466_176), ("glow-256", 174_681_600), ("glow-256-affine", 230_444_160)]
)
def test_sizes_of_the_specification(preset: str, live: int) -> None:
    settings = {**family("glow").presets[preset]["model"], **REPOSITORY}
    with torch.device("meta"):
        model = build_model("glow", settings)
    assert sum(p.numel() for p in model.parameters()) == live == live_parameters(GlowConfig(**settings))


def test_size_of_the_papers_cifar_model() -> None:
    settings = {**family("glow").presets["glow-cifar"]["model"], **REPOSITORY}
    assert abs(live_parameters(GlowConfig(**settings)) / 1e6 - 44.05) < 0.005


@pytest.mark.parametrize("preset", list(family("glow").presets))
def test_presets_add_the_papers_parts(preset: str) -> None:
    """Two actnorm values for each bias, taps of the indicator channel, the learned priors."""
    config = GlowConfig(**family("glow").presets[preset]["model"])
    with torch.device("meta"):
        model = build_model("glow", config)
    h, more = config.hidden_channels, 0
    for level in range(config.levels):
        c = config.width(level)
        out = c if config.coupling == "affine" else c // 2
        more += config.steps * (2 * h + 9 * h + 9 * out)
        if level < config.levels - 1:
            more += 9 * c * (c // 2) + 9 * c + 2 * c  # the split prior's convolution, its taps, bias and gain
        else:
            more += (9 + 2) * 2 * c
    assert sum(p.numel() for p in model.parameters()) == live_parameters(config) + more


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 20, "levels": 3}, "resolution must be divisible by 2\\^levels = 8, not 20"),
        ({"classifier": True}, "a classifier needs classes"),
        ({"scale": "tanh"}, "scale"),
        ({"steps": 0}, "steps"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model("glow", {**BASE, **changes})


def test_wrong_shapes_are_refused() -> None:
    model = make({})
    with pytest.raises(DataError, match=r"images must be \[B, 3, 8, 8\]"):
        model.encode(images(1, side=16))
    latents = model.encode(images(1)).latents
    with pytest.raises(DataError, match="latent z0"):
        model.decode(latents | {"z0": latents["z1"]})
