"""Kernels of a generator that makes its weights for each image, against float64, and INR-GAN on them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import bias_act, dispatch, modulated_weights, quantise, split_act
from hflow_rt.kernels.quantise import quantise_reference
from hflow_rt.models.inrgan.config import INRGANConfig
from hflow_rt.models.inrgan.losses import path_lengths, slope
from hflow_rt.models.inrgan.model import INRGAN
from hflow_rt.models.inrgan.plan import INRGANPlan
from hflow_rt.models.inrgan.presets import TINY

AsGood = Callable[..., None]


@pytest.fixture
def normal(device: str) -> Callable[..., Tensor]:
    """Other numbers in every run; a failure shows the seed."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return lambda *size: torch.randn(size, generator=generator).to(device)


def compare(run: Callable[..., Tensor], inputs: list[Tensor | None], as_good: AsGood) -> None:
    """Results and all gradients, in float32."""

    def everything(choice: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
        with dispatch.using(choice):
            y = run(*leaves)
            above = (1 + torch.arange(y.numel(), dtype=torch.float64).sin()).view(y.shape).to(y)
            return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], above)]

    found, plain = everything("triton", torch.float32), everything("reference", torch.float32)
    for mine, truth, torchs in zip(found, everything("reference", torch.float64), plain, strict=True):
        as_good(mine, truth, torchs, ulps=4)


@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 4, 33, 70), (3, 5)])
def test_activation(size: tuple[int, ...], normal: Callable[..., Tensor], as_good: AsGood) -> None:
    compare(lambda x, bias: bias_act.bias_act(x, bias), [normal(*size), normal(size[1])], as_good)
    compare(lambda x: bias_act.bias_act(x, gain=0.7, slope=0.1, clamp=0.4), [normal(*size)], as_good)


@pytest.mark.parametrize("size", [(2, 5, 7, 3), (3, 16, 33, 2), (1, 3, 70, 10)])
def test_weights(size: tuple[int, ...], normal: Callable[..., Tensor], as_good: AsGood) -> None:
    batch, c_out, c_in, rank = size
    style, weight = normal(batch, (c_out + c_in) * rank), normal(c_out, c_in)
    for columns in (None, 1.5 + normal(batch, c_in).tanh()):
        compare(
            lambda s, w, c: modulated_weights.modulated_weights(s, w, rank, 1 / math.sqrt(rank), c),
            [style, weight, columns],
            as_good,
        )


@pytest.mark.parametrize("mode", split_act.MODES)
@pytest.mark.parametrize("side", [2, 3, 17])
def test_a_layer_in_two_parts(side: int, mode: str, normal: Callable[..., Tensor], as_good: AsGood) -> None:
    inputs = [normal(2, 3, 2 * side, 2 * side), normal(2, 3, side, side), normal(3)]
    compare(lambda high, low, bias: split_act.split_act(high, low, bias, mode, 0.7), inputs, as_good)


def test_bytes(normal: Callable[..., Tensor]) -> None:
    images = 0.5 + normal(3, 3, 9, 40) / 2
    images[0, 0, 0, :7] = torch.tensor([0.5 / 255, 1.5 / 255, -0.0, 1.0, 2.0, math.inf, -math.inf])
    assert torch.equal(quantise.quantise(images), quantise_reference(images))
    assert quantise.quantise(images).is_contiguous()
    assert torch.equal(quantise.quantise(images[:, :1].mT), quantise_reference(images[:, :1].mT))


def test_wrong_shapes_are_refused(device: str) -> None:
    x = torch.zeros(2, 6, 4, 4, device=device)
    with pytest.raises(ValueError, match=r"the bias must be \[6\], not \[5\]"):
        bias_act.bias_act(x, x[0, :5, 0, 0])
    with pytest.raises(ValueError, match=r"a style must be \[B, 20\], not \[2, 6\]"):
        modulated_weights.modulated_weights(x[:, :, 0, 0], x[0, :, 0], 2)
    with pytest.raises(ValueError, match=r"factors of columns must be \[2, 2\], not \[2, 4\]"):
        modulated_weights.modulated_weights(x[:, :, 0, 0], x[0, :4, 0, :2], 1, columns=x[:, 0, 0])
    with pytest.raises(ValueError, match=r"the other part must be \[2, 6, 8, 8\], not \[2, 6, 4, 4\]"):
        split_act.split_act(x, x, x[0, :, 0, 0], "nearest")
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\], not \[6, 4, 4\]"):
        quantise.quantise(x[0])


@pytest.fixture
def launched(launched_by: Callable[..., list[str]]) -> list[str]:
    """Names of the kernels launched so far."""
    return launched_by(bias_act, modulated_weights, split_act)


def near(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-3, atol=1e-4 * float(torchs.abs().max()) + 1e-7)


def make(device: str, upsampling: str) -> INRGAN:
    torch.manual_seed(1)
    model = INRGAN(INRGANConfig(**(TINY["model"] | {"upsampling": upsampling, "classes": ()})))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.to(device)


def test_inrgan_trains_on_the_kernels(device: str, launched: list[str]) -> None:
    """Every layer, and gradients of gradients: by w of path lengths, and by images of their slope."""
    model = make(device, "nearest")
    plan = INRGANPlan(model).to(device)
    z, direction, images = (torch.randn(size).to(device) for size in ((2, 8), (2, 3, 16, 16), (2, 3, 16, 16)))

    def run() -> list[Tensor]:
        w = model.slots(model.mapping(z))
        uneven = path_lengths(model.synthesis, w, direction).square().sum()
        made = torch.autograd.grad(uneven, [p for p in model.parameters() if p.dim() > 1], allow_unused=True)
        judged = plan.discriminator(model.synthesis(w)).sum() + slope(plan.discriminator, images).sum()
        used = [*model.synthesis.parameters(), *plan.discriminator.parameters()]
        return [uneven.detach(), *(g for g in made if g is not None), *torch.autograd.grad(judged, used)]

    found = run()
    layers = sum(len(stage.layers) for stage in model.synthesis.own_stages())
    convolutions = 2 + 2 * len(plan.discriminator.blocks)
    assert launched.count("_generate_kernel") == 2 * layers
    assert launched.count("_act_kernel") == 2 * layers + 2 * convolutions
    assert launched.count("_generate_gradient") == 3 * layers
    launched.clear()
    with dispatch.using("reference"):
        expected = run()
    assert launched == []
    near(found, expected)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_inrgan_draws_on_the_kernels(upsampling: str, device: str, launched: list[str]) -> None:
    """Folded: the first layer of what is enlarged in two parts, spreads in the columns of the next weights."""
    model = make(device, upsampling)
    forward = model.graphs()["forward"].module.to(device)
    z, psi, cutoff = (
        torch.randn(2, 8).to(device),
        torch.full((2,), 0.7, device=device),
        torch.full((2,), 7.0, device=device),
    )
    (found,) = forward(z, psi, cutoff)
    layers = sum(len(stage.layers) for stage in model.synthesis.own_stages())
    assert launched.count("_generate_kernel") == layers
    assert launched.count("_split_kernel") == 1
    assert launched.count("_act_kernel") == layers - 1
    with dispatch.using("reference"):
        (expected,) = forward(z, psi, cutoff)
    assert expected.std() > 0.01
    near([found], [expected])
