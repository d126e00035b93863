"""NVAE: sizes, flows that keep volume, likelihoods that sum to one, both ways between image and noise."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hflow_rt.errors import ConfigError
from hflow_rt.kernels.mixture_kernels import parameters_of
from hflow_rt.models.checkpoint import parse_config
from hflow_rt.models.nvae.config import NVAEConfig, halved_groups
from hflow_rt.models.nvae.convolution import NormedConv2d, convolutions
from hflow_rt.models.nvae.folded import folded
from hflow_rt.models.nvae.inverse import forward, inverse
from hflow_rt.models.nvae.model import NVAE
from hflow_rt.models.nvae.network import Network, packed, unpacked
from hflow_rt.models.nvae.objective import balance_targets, kl_weight, weight_penalty
from hflow_rt.models.nvae.output import Mixture, pixels
from hflow_rt.models.nvae.plan import NVAEPlan
from hflow_rt.models.nvae.posterior_flow import MaskedCell, PosteriorFlow
from hflow_rt.models.nvae.presets import PRESETS, TINY
from hflow_rt.models.plan import Batch, Place, draw
from hflow_rt.training.config import TrainingConfig

# preset: parameters, of the generator alone, batch norms, convolutions
SIZES = {
    "nvae-mnist": (33_363_134, 12_672_258, 214, 255),
    "nvae-cifar": (130_852_480, 51_827_336, 364, 610),
    "nvae-celeba-64": (153_281_364, 58_061_448, 436, 730),
    "nvae-imagenet-32": (268_509_444, 106_333_664, 340, 570),
    "nvae-celeba-256": (330_798_664, 119_540_884, 460, 986),
    "nvae-celeba-256-small": (214_250_352, 77_097_566, 460, 986),
}


def make(**changes: Any) -> Network:
    """In float64, with running statistics and gains of batch norms that are not 0 and 1."""
    torch.manual_seed(1)
    network = Network(NVAEConfig(**TINY["model"] | changes)).double().eval().requires_grad_(False)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.1)
    return network


def draws(network: Network, name: str, count: int, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = network.config.packed_shapes(name)
    return {key: torch.randn(count, *shape, generator=generator).double() for key, shape in shapes.items()}


def images(network: Network, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    levels = 2**network.config.bits
    return torch.randint(levels, (count, *network.config.image_shape), generator=generator).double() / (levels - 1)


@pytest.mark.parametrize("preset", SIZES)
def test_sizes_are_the_published_ones(preset: str) -> None:
    with torch.device("meta"):
        network = Network(NVAEConfig(**PRESETS[preset]["model"]))
    parameters = dict(network.named_parameters())
    generator = [
        p for name, p in parameters.items() if name.split(".")[0] in ("top", "priors", "decoder", "after", "head")
    ]
    found = [sum(p.numel() for p in listed) for listed in (parameters.values(), generator)]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert (*found, norms, len(convolutions(network))) == SIZES[preset]


def test_recipes_are_the_published_ones() -> None:
    for preset in (*PRESETS.values(), TINY):
        TrainingConfig(**preset["training"])
    cifar = TrainingConfig(**PRESETS["nvae-cifar"]["training"])
    epoch = 195 * 256
    assert (cifar.images, cifar.decay_start_images, cifar.warmup_images) == (400 * epoch, 5 * epoch, 5 * epoch - 256)
    assert cifar.learning_rates["network"] == pytest.approx(1e-2 * 974 / 975)
    assert PRESETS["nvae-ffhq-256"]["model"] == PRESETS["nvae-celeba-256"]["model"] | {"weight_penalty": 0.1}


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_flow_keeps_volume(mirrored: bool) -> None:
    """Every value depends on itself with slope 1, and on those before it alone."""
    torch.manual_seed(0)
    channels, side = 3, 4
    cell = MaskedCell(channels, mirrored).double()
    shape = (1, channels, side, side)
    jacobian = torch.autograd.functional.jacobian(cell, torch.randn(shape, dtype=torch.float64))
    pixels = list(itertools.product(range(side), range(side)))
    order = [c * side**2 + y * side + x for y, x in (pixels[::-1] if mirrored else pixels) for c in range(channels)]
    matrix = jacobian.reshape(channels * side**2, -1)[order][:, order]
    assert torch.equal(matrix.diagonal(), torch.ones(len(matrix), dtype=torch.float64))
    assert not matrix.triu(1).any()
    assert (matrix.tril(-1) != 0).sum() > 300  # it does depend on those


def test_flows_of_a_group_are_applied_in_turn() -> None:
    network = make(flows=2)
    noise = [torch.zeros(1, *network.config.group_shape(group), dtype=torch.float64) for group in range(3)]
    inferred = network.infer(network.bottom_up(images(network, 1)), noise)
    flows = [flow for flow in network.flows if isinstance(flow, PosteriorFlow)]
    start, middle, end = inferred.groups[1].path
    assert torch.equal(flows[2](start), middle)
    assert torch.equal(flows[3](middle), end)
    assert len(flows) == 6


@pytest.mark.parametrize(("channels", "bits"), [(1, 2), (1, 8), (3, 2)])
def test_levels_have_probabilities_that_sum_to_one(channels: int, bits: int) -> None:
    """Exactly; the published form gives level 254 the whole upper tail too."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, (10 if channels == 3 else 3) * 4, 1, 1, generator=generator).double()
    logits = logits.expand(2**bits, -1, 1, 1)
    levels = torch.arange(2**bits).double() / (2**bits - 1)

    def total(published: bool) -> float:
        mixture, summed = Mixture(logits, channels, bits, published), torch.tensor(0.0).double()
        if channels == 1:
            return mixture.log_prob(levels[:, None, None, None]).exp().sum().item()
        for red, green in itertools.product(levels, levels):
            colours = torch.stack((red.expand_as(levels), green.expand_as(levels), levels), 1)
            summed += mixture.log_prob(colours[:, :, None, None]).exp().sum()
        return summed.item()

    assert total(published=False) == pytest.approx(1, abs=1e-12)
    if bits == 8:
        assert total(published=True) > 1.001


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fits", [False, True])
@pytest.mark.parametrize("narrow", [1.0, -3.0, -7.0])
def test_a_likelihood_in_float32_is_within_a_ten_thousandth_of_a_nat(narrow: float, fits: bool, channels: int) -> None:
    """Of float64, a pixel, with edges and the narrowest scales; a single one as near as float32 numbers of its size.

    Where narrow logistics do not fit, levels lie in far tails, whose differences of sigmoids are 0.
    """
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        edges = (torch.randn(2, channels, 16, 16, generator=generator) * 160 + 127).round().clamp(0, 255)
        image, logits = edges / 255, torch.randn(2, parameters_of(channels) * 10, 16, 16, generator=generator)
        means, scales = torch.unflatten(logits[:, 10:], 1, (channels, -1, 10)).unbind(2)[:2]
        scales.add_(narrow)
        if fits:
            means.mul_(scales.exp()).add_((2 * image - 1)[:, :, None])
            logits[:, 10:].unflatten(1, (channels, -1, 10))[:, :, 2:].zero_()
        found = Mixture(logits, channels).log_prob(image)
        exact = Mixture(logits.double(), channels).log_prob(image.double())
        off = (found - exact).abs()
        assert off.mean() < 1e-4
        assert (off <= 1e-4 + 2 * torch.finfo(torch.float32).eps * exact.abs()).all()
    assert {0.0, 1.0} <= set(image.unique().tolist())
    assert (exact.min() < -500) == (narrow == -7 and not fits)


def test_lower_temperatures_draw_closer_to_the_mean() -> None:
    torch.manual_seed(0)
    logits, uniform = torch.randn(4, 100, 8, 8), torch.rand(4, 3, 8, 8) * 0.9 + 0.05
    mixture = Mixture(logits)
    apart = [(mixture.draw(torch.rand(4, 10, 8, 8), uniform, t) - mixture.mean()).abs().mean() for t in (0.3, 1.0)]
    assert apart[0] < apart[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flows": 0, "residual_posterior": False, "squeeze_excite": False},
        {"output": "bernoulli", "bits": 1, "channels": 1, "padding": 4},
        {"output": "normal", "encoder_width": 3, "groups": (1, 2), "decoder_cells": 2},
        {"channels": 1, "blocks": 0},
    ],
)
def test_noise_of_an_image_makes_its_reconstruction(changes: dict[str, Any]) -> None:
    network = make(**changes)
    x = images(network, 2)
    for noise in (None, draws(network, "noise", 2)):
        found = inverse(network, x, noise)
        shapes = {name: tuple(z.shape[1:]) for name, z in found.latents.items()}
        assert shapes == network.config.packed_shapes("z")
        expected = network.crop(pixels(network.config, found.logits).mean())
        image = forward(network, found.latents)
        assert image.shape == x.shape
        assert (image - expected).abs().max() < 1e-12
        if noise is not None and network.config.flows:
            assert torch.allclose(found.divergences.sum(1), found.log_q - found.log_p)
    other = {name: 0.5 * z for name, z in found.latents.items()}
    assert (forward(network, other) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{"encoder_width": 3}, {"squeeze_excite": False, "blocks": 2, "groups": (2,)}])
def test_folding_changes_nothing(changes: dict[str, Any]) -> None:
    """Norms, masks, norms of weights and the four shifts of odd widths; float32 rounds the constants alone."""
    network = make(**changes)
    plain, x = folded(network).double(), images(network, 2)
    assert not any(isinstance(module, nn.BatchNorm2d | NormedConv2d) for module in plain.modules())
    noise = draws(network, "noise", 2)
    found, expected = inverse(plain, x, noise), inverse(network, x, noise)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.log_p, expected.log_p, rtol=1e-5)


def test_groups_are_packed_by_scale_top_first() -> None:
    config = NVAEConfig(**TINY["model"])
    groups = [torch.full((1, *config.group_shape(group)), float(group)) for group in range(3)]
    scales = packed(config, "z", groups)
    assert list(scales) == ["z1", "z0"]
    assert scales["z0"][0, :, 0, 0].tolist() == [1, 1, 2, 2]
    assert all(map(torch.equal, unpacked(config, "z", scales), groups))


def test_weights_of_the_objective() -> None:
    config = NVAEConfig(**PRESETS["nvae-imagenet-32"]["model"])
    assert [kl_weight(config, step, 10_000) for step in (0, 1501, 3001, 9999)] == pytest.approx([1e-4, 0.5, 1, 1])
    assert [weight_penalty(config, weight) for weight in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.1, 0.01])
    targets = balance_targets(NVAEConfig(**PRESETS["nvae-celeba-256"]["model"]))
    assert targets == [1] * 4 + [4] * 4 + [16] * 4 + [32] * 8 + [64] * 16
    assert halved_groups(20, 3) == (20, 10, 5)


def test_mixed_precision_keeps_densities_and_penalties() -> None:
    torch.manual_seed(0)
    plan = NVAEPlan(NVAE(NVAEConfig(**TINY["model"])).train())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, *plan.model.config.image_shape), generator=generator, dtype=torch.uint8)
    batch = Batch(pixels, draw(plan.draws("network"), 4, generator), {})
    found = []
    for enabled in (False, True):
        plan.start(pixels, torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(plan.loss("network", batch, Place(0, 100, 200)))
    whole, mixed = found
    assert mixed.loss.dtype == torch.float32
    for name in ("spectral", "gains"):
        assert torch.equal(whole.terms[name], mixed.terms[name])
    assert whole.terms["spectral"] > 10
    assert mixed.terms["reconstruction"] == pytest.approx(whole.terms["reconstruction"].item(), rel=0.01)
    assert mixed.bits_per_dim != whole.bits_per_dim  # the convolutions are in bfloat16


def test_bounds_are_of_probabilities_alone() -> None:
    def claims(**changes: Any) -> dict[str, str]:
        model = NVAE(NVAEConfig(**TINY["model"] | changes))
        return {name: bound.claim for name, bound in model.bounds().items()}

    assert claims() == {"elbo": "upper", "importance": "upper"}
    assert claims(likelihood="published") == {"published": "published"}
    assert claims(output="normal") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 6}, r"divisible by 4, for 1 blocks and 2 scales, not 6"),
        ({"output": "bernoulli"}, r"bernoulli and bits 1 need each other; found bernoulli and 8"),
        ({"bits": 1}, r"bernoulli and bits 1 need each other; found mixture and 1"),
        ({"output": "bernoulli", "bits": 1}, r"grey images; set channels to 1"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(NVAEConfig, TINY["model"] | changes)
