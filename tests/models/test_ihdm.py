"""IHDM: sizes, the blur, what is trained, the bound, the sampler."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.models.checkpoint import parse_config
from hflow_rt.models.ihdm.bank import Waves, evenly, known, surviving
from hflow_rt.models.ihdm.blur import Blur, blur_lengths, cosine_basis, damping
from hflow_rt.models.ihdm.bound import (
    bits_per_dim,
    level_cost,
    pixel_cost,
    start_cost,
    step_cost,
)
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.inverse import decoded, read_parallel, read_sequence
from hflow_rt.models.ihdm.linear import linear_estimate
from hflow_rt.models.ihdm.model import IHDM
from hflow_rt.models.ihdm.network import UNet
from hflow_rt.models.ihdm.plan import levels_of
from hflow_rt.models.ihdm.presets import PRESETS, TINY
from hflow_rt.models.ihdm.sampling import blend, interpolation_weights, prior_state, sample, states
from hflow_rt.models.plan import Batch, Place
from hflow_rt.training.config import TrainingConfig

# as published: no patches, and the network adds to its state
PLAIN = TINY["model"] | {"patch": 1, "linear_skip": False}
LINEAR = {"patch": 2, "linear_skip": True}
# preset: numbers, tensors, and level biases of all blocks
SIZES = {
    "ihdm-mnist": (42_082_049, 400, 6272),
    "ihdm-mnist-small": (3_704_129, 398, 1856),
    "ihdm-cifar": (61_060_867, 558, 8576),
    "ihdm-afhq-64": (88_217_219, 338, 7424),
    "ihdm-ffhq-128": (159_981_443, 430, 10_880),
    "ihdm-church-128": (261_828_227, 722, 18_560),
    "ihdm-afhq-256": (210_904_835, 576, 14_720),
    "ihdm-ffhq-256": (210_904_835, 576, 14_720),
}


def make(**changes: Any) -> IHDM:
    """In float64, with nothing left at zero."""
    torch.manual_seed(1)
    model = IHDM(IHDMConfig(**PLAIN | {"sigma": 0.01, "delta": 0.0125} | changes)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def images(count: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", list(SIZES))
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        network = IHDM(IHDMConfig(**PRESETS[name]["model"])).network
    parameters = list(network.parameters())
    widths = sum(block.width for block in network.blocks())
    assert (sum(p.numel() for p in parameters), len(parameters), widths) == SIZES[name]


def test_settings_that_no_network_has() -> None:
    for changes, message in (
        ({"blur_max": 0.1}, "blur_max must be at least blur_min = 0.5, not 0.1"),
        ({"resolution": 7}, "resolution must be divisible by 2, for 2 stages, not 7"),
        ({"moments": False, "linear_skip": True}, "linear_skip needs moments = true"),
        ({"patch": 3}, "divisible by 6, for 2 stages and patches of 3 pixels, not 8"),
        ({"widths": (8, 12)}, "base_width times every one of widths must be a multiple of 32, not 48"),
        ({"attention": (0, 2)}, "attention must name stages 0 to 1, not 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(IHDMConfig, {**PLAIN, **changes})


def test_blur_is_the_damping_of_cosine_waves() -> None:
    config = IHDMConfig(**PLAIN)
    x, lengths = images(4), blur_lengths(config)
    assert lengths[[0, 1, -1]].tolist() == [0.0, 0.5, 4.0]
    assert torch.allclose(lengths[2:] / lengths[1:-1], torch.full((3,), 2.0, dtype=torch.float64))
    basis = cosine_basis(8)
    assert torch.allclose(basis @ basis.T, torch.eye(8, dtype=torch.float64), atol=1e-14)
    blur, frequency = Blur(config), torch.arange(8, dtype=torch.float64) * (math.pi / 8)
    for level in range(5):
        heat = torch.exp(-(frequency[:, None] ** 2 + frequency**2) * lengths[level] ** 2 / 2)
        expected = basis.T @ (basis @ x @ basis.T * heat) @ basis
        assert torch.allclose(blur(x, level), expected, atol=1e-13)
    each = torch.tensor([3, 0, 4, 1])
    assert torch.equal(blur(x, each)[2], blur(x[2:3], 4)[0])
    assert torch.allclose(blur(x, 0), x, atol=1e-14)
    for beyond in (5, -1, torch.tensor([0, 1, 5, 2])):
        with pytest.raises(ConfigError, match=r"a level of blur must be in 0 \.\. 4; found (5|-1)"):
            blur(x, beyond)
    assert torch.allclose(blur(torch.full_like(x, 0.3), 4), torch.full_like(x, 0.3), atol=1e-14)


def test_a_fresh_network_adds_nothing() -> None:
    model = IHDM(IHDMConfig(**PLAIN))
    u = images(2).float()
    assert torch.equal(model.mean(u, torch.tensor([1, 4])), u)


def test_the_level_matters() -> None:
    model, u = make(), images(1)
    first, second = (model.mean(u, torch.tensor([level])) for level in (1, 4))
    assert (first - second).abs().max() > 1e-4


def test_patches_are_channels() -> None:
    # of a network at half the side, which has four times the channels of the image
    model, u, level = make(patch=2), images(3), torch.tensor([1, 2, 4])
    within = UNet(model.config.model_copy(update={"patch": 1, "resolution": 4, "channels": 12})).double().eval()
    within.load_state_dict(model.network.state_dict())
    squares = torch.stack([u[:, c, i::2, j::2] for c in range(3) for i in (0, 1) for j in (0, 1)], 1)
    found = within(squares, level)
    assert found.abs().max() > 0.01
    for index, (c, i, j) in enumerate(itertools.product(range(3), (0, 1), (0, 1))):
        assert torch.allclose(model.network(u, level)[:, c, i::2, j::2], found[:, index], atol=1e-12)


def test_every_level_is_trained_unless_the_published_way_is_asked_for() -> None:
    draws = torch.tensor([0.0, 0.24999, 0.25, 0.5, 0.75, 1 - 2**-24])
    assert levels_of(draws, 4).tolist() == [1, 1, 2, 3, 4, 4]
    pixels, noise = (images(4) * 255).round().to(torch.uint8), images(4, seed=3)
    batch = Batch(pixels, {"level": torch.full((4,), 0.99), "noise": noise.float()}, {})
    for changes, level in (({}, 4), ({"train_last_level": False}, 3)):
        model = make(**changes).float()
        plan = model.plan(TrainingConfig(**TINY["training"]))
        found = plan.loss("network", batch, Place())
        expected = model.errors(pixels / 255, torch.full((4,), level), noise.float()).mean()
        assert torch.equal(found.loss, expected)
        assert {spec.name: spec.shape for spec in plan.draws("network")} == {"level": (), "noise": (3, 8, 8)}


def test_the_loss_is_a_sum_over_the_image() -> None:
    model = IHDM(IHDMConfig(**PLAIN)).double()
    x, zero = images(2), torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    fresh = model.errors(x, torch.tensor([4, 2]), zero)
    step = torch.stack([model.blur(x[:1], 3) - model.blur(x[:1], 4), model.blur(x[1:], 1) - model.blur(x[1:], 2)])
    assert torch.allclose(fresh, step.square().sum((1, 2, 3, 4)))


def test_start_cost_is_that_of_a_mixture() -> None:
    """Against a sum over components, and of a test image that lies on a training image."""
    model, delta = make(), 0.02
    train, test = images(5, seed=4), images(2, seed=5)
    test[1] = train[3]
    starts = Waves(model.config).coefficients(model.blur(train, 4))
    found = start_cost(model, test, starts, delta)
    values, sigma = 3 * 64, model.config.sigma
    squared = (model.blur(test, 4)[:, None] - model.blur(train, 4)[None]).square().flatten(2).sum(2)
    ratio = sigma**2 / delta**2
    divergence = (values * (ratio - 1 - math.log(ratio)) + squared / delta**2) / 2
    assert torch.allclose(found, math.log(5) - torch.logsumexp(-divergence, 1), rtol=1e-9)
    with pytest.raises(DataError, match="the bank has none; give images"):
        start_cost(model, test, starts[:0], delta)


def test_costs_of_a_perfect_step() -> None:
    model, zero = make(), torch.zeros(1, dtype=torch.float64)
    assert step_cost(model.config, zero, model.config.sigma).item() == 0
    assert math.isclose(step_cost(model.config, zero + 1e-4, 0.01).item(), 0.5)
    assert math.isclose(pixel_cost(model.config, zero, 0.01).item(), 192 * math.log(0.01 * math.sqrt(2 * math.pi)))
    assert math.isclose(bits_per_dim(model.config, (zero - 192) * math.log(256)).item(), 0, abs_tol=1e-12)


def test_sampling_ends_with_a_mean_and_ignores_the_last_noise() -> None:
    model, noise = make(), images(4, seed=6)
    start = prior_state(model, images(1), noise[:1])
    assert torch.allclose(start, model.blur(images(1), 4) + 0.0125 * noise[:1])
    u = start
    for k in (4, 3, 2):
        u = model.mean(u, torch.tensor([k])) + 0.02 * noise[k - 1 : k]
    expected = model.mean(u, torch.tensor([1]))
    assert torch.equal(sample(model, start, lambda k: noise[k - 1 : k], 0.02), expected)


def test_interpolation_ends_at_both() -> None:
    linear, angular = interpolation_weights(3, torch.float64)
    assert linear.tolist() == [[1, 0.5, 0], [0, 0.5, 1]]
    assert torch.allclose(angular.square().sum(0), torch.ones(3, dtype=torch.float64))
    first, second = images(2)
    ends = blend(first, second, angular)
    assert torch.allclose(ends[0], first)
    assert torch.allclose(ends[-1], second)
    with pytest.raises(ConfigError, match="at least 2 points, not 1"):
        interpolation_weights(1)


def test_as_few_waves_as_rebuild_any_start() -> None:
    counts = {name: len(surviving(IHDMConfig(**PRESETS[name]["model"]))) for name in SIZES}
    assert list(counts.values()) == [8, 8, 8, 13, 4, 13, 13, 13]
    config = IHDMConfig(**PLAIN)
    kept = Waves(config)
    extreme = (images(9) > 0.5).double()
    blurred = Blur(config)(extreme, 4)
    found = kept.coefficients(blurred)
    assert (kept.rebuilt(found) - blurred).abs().max() < 1e-6
    found[..., -3:] = 0
    assert (kept.rebuilt(found) - blurred).abs().max() > 1e-6
    assert torch.allclose(found[..., 0], extreme.mean((2, 3)))


def test_the_bank_is_of_images_evenly() -> None:
    config = IHDMConfig(**PLAIN)
    pixels = (images(6) * 255).round().to(torch.uint8)
    each, found = known(config, torch.split(pixels, 4))
    few, many = evenly(each, 3), evenly(each, 8)
    assert few.dtype == found.dtype == torch.float32
    # in any batches, the moments of all
    basis = cosine_basis(8)
    coefficients_of = basis @ (pixels / 255).double() @ basis.T
    assert torch.allclose(found[0].double(), coefficients_of.mean(0), atol=1e-6)
    assert torch.allclose(found[1].double(), coefficients_of.var(0, correction=0), atol=1e-6)
    assert torch.equal(many[:6], many[torch.tensor([6, 7, 2, 3, 4, 5])])
    assert torch.equal(few, many[[0, 2, 4]])


def test_the_linear_estimate_is_that_of_a_gaussian() -> None:
    """Against the conditional mean and variance by matrices over the pixels."""
    config, sigma = IHDMConfig(**PLAIN), 0.05
    basis, left = cosine_basis(8), damping(config)[[2, 4]]
    moments = torch.stack([images(1)[0], images(1, seed=3)[0] + 0.1])
    u = images(2, seed=4)
    found = linear_estimate(u, left, (reached := damping(config)[[1, 3]]), basis, moments, sigma)
    waves, noise = torch.kron(basis, basis), sigma**2 * torch.eye(64)
    for index in range(2):
        blur, sharper = (waves.T @ torch.kron(axis[index], axis[index]).diag() @ waves for axis in (left, reached))
        missed = []
        for channel in range(3):
            mean, variance = (moment[channel].flatten() for moment in moments)
            of_data = waves.T @ variance.diag() @ waves
            gain = of_data @ blur @ torch.linalg.inv(blur @ of_data @ blur + noise)
            sharp = waves.T @ mean + gain @ (u[index, channel].flatten() - blur @ waves.T @ mean)
            assert torch.allclose(found.sharp[index, channel].flatten(), sharp, atol=1e-9)
            assert torch.allclose(found.sharper[index, channel].flatten(), sharper @ sharp, atol=1e-9)
            missed.append((sharper @ (of_data - gain @ blur @ of_data) @ sharper).diagonal())
        assert torch.allclose(found.missed[index].square(), torch.cat(missed).mean())


@pytest.mark.parametrize("changes", [{}, LINEAR], ids=["plain", "linear skip"])
def test_folded_graphs_are_the_model(changes: dict[str, Any]) -> None:
    """`step` and `read` of a row of the table, against the network that is told the level."""
    model = make(**changes)
    model.know((255 * images(6)).byte())
    graphs, loop = model.graphs(), model.routes()["inverse"]
    assert not [name for name, _ in graphs["step"].module.named_parameters() if "embedding" in name or "level" in name]
    u, noise, x = images(2), images(2, seed=7) - 0.5, images(2, seed=8)
    delta, zero = torch.tensor([0.01, 0.02]), torch.zeros(2, 3, 8, 8)
    for index, k in ((0, 4), (3, 1)):
        rows = {name: torch.from_numpy(table[index : index + 1]) for name, table in loop.schedule.items()}
        axes, before = (rows["damping"], rows["reached"]), [rows["blurred"]] if "blurred" in rows else []
        mean = model.mean(u, torch.tensor([k, k]))
        aim = model.blur(x, k - 1) + 0.01 * noise if k > 1 else x
        reached = mean + delta[:, None, None, None] * noise if k > 1 else mean
        expected = {
            "step": (reached, reached.clamp(0, 1)),
            "read": ((aim - mean) / delta[:, None, None, None], zero, aim) if k > 1 else (zero, x - mean, x),
        }
        given = {
            "step": (u, noise, zero, rows["level"], rows["goes_on"], delta, *axes, *before),
            "read": (u, x, noise, rows["level"], rows["goes_on"], axes[1], delta, torch.zeros(2), axes[0], *before),
        }
        for name, values in given.items():
            found = graphs[name].module(*(value.float() for value in values))
            exact = graphs[name].reference.double()(*(value.double() for value in values))
            scale = 1 / delta.min() if name == "read" else 1
            for one, other, correct in zip(found, exact, expected[name], strict=True):
                assert (other - correct).abs().max() < 3e-7 * scale
                assert (one - correct).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("changes", [{}, LINEAR], ids=["plain", "linear skip"])
def test_images_come_back_from_what_was_read_off(changes: dict[str, Any]) -> None:
    model = make(**changes)
    model.know((255 * images(6)).byte())
    x, draws = images(3), torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    sequence, parallel = read_sequence(model, x, draws, 0.02), read_parallel(model, x, draws, 0.02)
    for latents in (sequence, parallel):
        assert (decoded(model, latents, 0.02) - x).abs().max() < 1e-9
        assert not latents.noise[:, -1].any()
    # in exact arithmetic both are the same, and the states that decoding passes are those that were drawn
    assert (sequence.noise - parallel.noise).abs().max() < 1e-8
    path = [
        x_k for _, x_k in states(model, model.blur(x, 4) + 0.01 * draws[:, 0], lambda k: sequence.noise[:, 4 - k], 0.02)
    ]
    assert torch.allclose(path[0], model.blur(x, 3) + 0.01 * draws[:, 1], atol=1e-9)
    rough = read_sequence(model, x, draws, 0.02, grid=1 / 16)
    assert (rough.noise * 16).frac().abs().max() == 0
    assert (decoded(model, rough, 0.02) - x).abs().max() < 1e-9
    assert (decoded(model, sequence._replace(noise=rough.noise), 0.02) - x).abs().max() > 1e-3


def test_only_the_sequence_stands_rounding() -> None:
    """In float32, with a network that makes much of little: what is lost in parallel is not in sequence."""
    model = make().float()
    model.network.head.weight.data *= 200
    x = images(3).float()
    draws = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    errors = [(decoded(model, read(model, x, draws)) - x).abs().max() for read in (read_sequence, read_parallel)]
    assert errors[0] * 20 < errors[1]


def test_a_start_without_noise_is_a_setting() -> None:
    assert make().prior_std() == {"start": 1.0, "start_noise": 1.0, "residual": 0.0}
    quiet = make(noisy_start=False)
    assert quiet.prior_std() == {"start": 1.0, "start_noise": 0.0, "residual": 0.0}


def test_a_fresh_network_beside_a_linear_skip_adds_nothing_either() -> None:
    """On images whose waves are independent normals its relative error is 1, also where networks are rounded."""
    basis, moments = cosine_basis(8), torch.stack([images(1)[0], images(1, seed=3)[0] + 0.1])
    normals = torch.randn(4000, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = basis.T @ (moments[0] + moments[1].sqrt() * normals) @ basis
    model = IHDM(IHDMConfig(**PLAIN | LINEAR))
    assert model.moments is not None
    model.moments.copy_(moments)
    level, noise = 1 + torch.arange(4000) % 4, torch.randn(4000, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        error, unit = model.errors_and_units(x.float(), level, noise)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = model.errors_and_units(x.float(), level, noise)
    for one in range(1, 5):
        assert (error / unit)[level == one].mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(rounded, error)


@pytest.mark.parametrize("changes", [{}, LINEAR], ids=["plain", "linear skip"])
def test_the_bound_is_the_mean_of_its_draws(changes: dict[str, Any]) -> None:
    """Over levels drawn evenly, the parts of one draw add up to all steps; and all is near what noise alone costs."""
    model = make(bank=3, **changes)
    pixels = (images(3, seed=11) * 255).round().to(torch.uint8)
    model.know(pixels)
    inputs = model.bound_inputs("strict", pixels[:1].expand(3, -1, -1, -1), torch.Generator().manual_seed(12))
    inputs |= {name: inputs[name][:1].expand(3, -1, -1, -1) for name in ("uniform", "noise", "pixel_noise")}
    inputs["level"] = torch.tensor([0.1, 0.5, 0.9])  # levels 2, 3 and 4
    parts = model.bound_terms(inputs)
    image, draws = inputs["image"].double(), {name: value.double() for name, value in inputs.items()}
    x = (255 * image[:1] + draws["uniform"][:1]) / 256
    states = torch.stack([draws["pixel_noise"][0], *draws["noise"]])[None]
    costs = torch.stack([level_cost(model, x, level, states[:, level - 1]) for level in range(1, 5)], 1)
    start = start_cost(model, x, model.bank()["start"], 0.0125) / (3 * 8 * 8 * math.log(2))
    total = start + costs.sum(1)
    assert torch.allclose(torch.stack(list(parts.values())).sum(0).mean(), total, rtol=1e-12)
    assert costs.shape == (1, 4)


@pytest.mark.parametrize("changes", [{}, LINEAR], ids=["plain", "linear skip"])
def test_the_graph_of_the_bound(changes: dict[str, Any]) -> None:
    model = make(bank=3, **changes)
    model.know((images(3, seed=11) * 255).round().to(torch.uint8))
    inputs = model.bound_inputs("strict", (images(4) * 255).to(torch.uint8), torch.Generator().manual_seed(12))
    inputs["level"] = torch.tensor([0.1, 0.5, 0.9, 1 - 2**-24])
    graph = model.graphs()["bound"]
    expected = model.bound_terms(inputs)
    assert [spec.name for spec in graph.inputs] == list(inputs)
    assert [spec.name for spec in graph.outputs] == list(expected)
    for module, dtype, allowed in ((graph.reference, torch.float64, 1e-6), (graph.module, torch.float32, 1e-4)):
        found = module.to(dtype)(*(value.to(dtype) for value in inputs.values()))
        for one, other in zip(found, expected.values(), strict=True):
            assert (one - other).abs().max() < allowed * other.abs().max()
