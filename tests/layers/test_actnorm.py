"""Actnorm: the affine map, its inverse and determinant, and initialisation from data."""

import math

import pytest
import torch
from torch import nn

from hflow_rt.layers.actnorm import ActNorm, data_init

SIZES = [(3, 4), (2, 5, 3, 2), (4, 3, 8, 8)]


def layer(channels: int, seed: int) -> ActNorm:
    norm = ActNorm(channels).double()
    generator = torch.Generator().manual_seed(seed)
    norm.log_scale.data = torch.randn(channels, generator=generator, dtype=torch.float64)
    norm.shift.data = torch.randn(channels, generator=generator, dtype=torch.float64)
    return norm


@pytest.mark.parametrize("size", SIZES)
def test_forward_is_the_formula_and_inverse_undoes_it(size: tuple[int, ...]) -> None:
    norm = layer(size[1], seed=sum(size))
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = norm(x)
    for channel in range(size[1]):
        scale, shift = math.exp(norm.log_scale[channel].item()), norm.shift[channel].item()
        assert (y[:, channel] - (x[:, channel] * scale + shift)).abs().max() < 1e-13
    assert (norm.inverse(y) - x).abs().max() < 1e-13
    assert (norm(norm.inverse(x)) - x).abs().max() < 1e-13


@pytest.mark.parametrize("size", [(1, 4), (1, 2, 3, 2)])
def test_log_det_is_that_of_the_jacobian(size: tuple[int, ...]) -> None:
    norm = layer(size[1], seed=1)
    x = torch.randn(size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(norm.inverse, x).reshape(x.numel(), x.numel())
    assert (norm.log_det(x) - torch.linalg.slogdet(jacobian)[1]).abs().item() < 1e-12


def test_data_init_gives_every_channel_mean_0_and_std_1() -> None:
    norm = ActNorm(3)
    x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([0.1, 1.0, 20.0]).view(1, 3, 1, 1) + torch.tensor([5.0, 0.0, -3.0]).view(1, 3, 1, 1)
    with data_init(norm):
        z = norm.inverse(x)
    assert z.mean((0, 2, 3)).abs().max() < 1e-5
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-5
    kept = norm.log_scale.clone()
    norm.inverse(2 * x)  # outside, nothing is initialised any more
    assert torch.equal(norm.log_scale, kept)


def test_data_init_skips_vectors_and_ends_after_an_error() -> None:
    norm = ActNorm(3)
    with data_init(norm):
        norm.inverse(torch.randn(4, 3))
    assert torch.equal(norm.log_scale, torch.zeros(3))
    with pytest.raises(RuntimeError, match="stop"), data_init(norm):
        raise RuntimeError("stop")
    assert not norm.initializing


class _Both(nn.Module):
    def __init__(self, norm: ActNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.norm(x), self.norm.inverse(x), self.norm.log_det(x)


def test_gradients() -> None:
    both = _Both(layer(3, seed=2))
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = {name: value.detach().requires_grad_() for name, value in both.named_parameters()}

    def call(x: torch.Tensor, *values: torch.Tensor) -> object:
        return torch.func.functional_call(both, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))
