"""Channel mixing: exact inverses, determinants, and orthogonality at the published width."""

import numpy as np
import pytest
import torch

from hflow_rt.layers.mixing import FreeMixing, UnitaryMixing, channel_map

Mixing = FreeMixing | UnitaryMixing
KINDS = [FreeMixing, UnitaryMixing]


def make(kind: type[Mixing], channels: int, seed: int = 0, scale: float = 0.3) -> Mixing:
    torch.manual_seed(seed)
    layer = kind(channels, scale)
    layer.weight.data += 0.3 * torch.randn(channels, channels)  # nothing special left
    return layer.double()


@pytest.mark.parametrize("size", [(3, 4), (2, 5, 3, 2), (1, 8, 4, 4)])
def test_mix_multiplies_every_pixel(size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(sum(size))
    x, matrix = rng.standard_normal(size), rng.standard_normal((size[1], size[1]))
    found = channel_map(torch.from_numpy(x), torch.from_numpy(matrix)).numpy()
    np.testing.assert_allclose(found, np.einsum("ij,bj...->bi...", matrix, x), atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [2, 5, 32])
def test_inverse_in_float64(kind: type[Mixing], channels: int) -> None:
    layer = make(kind, channels, seed=channels)
    matrix, undone = layer.matrices()
    assert matrix.dtype == undone.dtype == torch.float64
    assert (matrix @ undone - torch.eye(channels)).abs().max() < 1e-11
    for x in (torch.randn(3, channels, dtype=torch.float64), torch.randn(2, channels, 4, 4, dtype=torch.float64)):
        assert (layer(layer.inverse(x)) - x).abs().max() < 1e-11
        assert (layer.inverse(x) - channel_map(x, matrix)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 4), (1, 3, 2, 2)])
def test_log_det_is_that_of_the_jacobian(kind: type[Mixing], size: tuple[int, ...]) -> None:
    layer = make(kind, size[1])
    x = torch.randn(size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer.inverse, x).reshape(x.numel(), x.numel())
    assert (layer.log_det(x) - torch.linalg.slogdet(jacobian)[1]).abs().item() < 1e-11


def test_free_mixing_is_scale_times_weight() -> None:
    layer = make(FreeMixing, 4, scale=0.7)
    matrix = 0.7 * layer.weight.detach().numpy()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    np.testing.assert_allclose(layer.matrices()[0].detach().numpy(), matrix, atol=1e-15)
    expected = np.log(abs(np.linalg.det(matrix))) * 9
    assert layer.log_det(x).item() == pytest.approx(expected, abs=1e-12)


def test_free_mixing_starts_orthogonal() -> None:
    torch.manual_seed(0)
    matrix, _ = FreeMixing(16, 0.3).matrices()
    assert (matrix @ matrix.mT - torch.eye(16)).abs().max() < 1e-6  # the weight itself is float32


def test_unitary_mixing_is_the_exponential_series() -> None:
    layer = make(UnitaryMixing, 4, scale=0.1)
    weight = layer.weight.detach().numpy()
    power, total = np.eye(4), np.eye(4)
    for n in range(1, 60):
        power = power @ (0.1 * (weight - weight.T)) / n
        total = total + power
    np.testing.assert_allclose(layer.matrices()[0].detach().numpy(), total, atol=1e-13)


def test_unitary_mixing_of_the_published_width_is_orthogonal() -> None:
    torch.manual_seed(0)
    layer = UnitaryMixing(508, 0.1)  # float32 weights, as trained
    matrix, undone = layer.matrices()
    assert (matrix @ undone - torch.eye(508)).abs().max() < 1e-12
    x = torch.randn(2, 508)
    assert layer.log_det(x).item() == 0.0
    assert (layer(layer.inverse(x)) - x).abs().max() < 2e-5  # float32 products of exact matrices


class _Both(torch.nn.Module):
    def __init__(self, layer: Mixing) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layer(x), self.layer.inverse(x), self.layer.log_det(x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: type[Mixing]) -> None:
    both = _Both(make(kind, 3))
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, weight: torch.Tensor) -> object:
        return torch.func.functional_call(both, {"layer.weight": weight}, (x,))

    assert torch.autograd.gradcheck(call, (x, both.layer.weight.detach().requires_grad_()))
