"""Layers of Glow: mixing by LU factors, permutations, and the constant map of what lies beyond the border."""

import pytest
import torch
from torch.nn import functional as F

from hflow_rt.layers.border import border_map
from hflow_rt.layers.lu import LUMixing
from hflow_rt.layers.permutation import ChannelPermutation


@pytest.mark.parametrize("channels", [2, 5, 24])
def test_lu_mixing(channels: int) -> None:
    torch.manual_seed(channels)
    layer = LUMixing(channels).double()
    matrix, inverse = layer.matrices()
    identity = torch.eye(channels).double()
    assert (matrix @ matrix.mT - identity).abs().max() < 1e-6  # starts as a rotation, kept in float32
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    matrix, inverse = layer.matrices()
    assert (matrix @ inverse - identity).abs().max() < 1e-11
    x = torch.randn(3, channels, 4, 5).double()
    y = layer.inverse(x)
    assert torch.allclose(y, torch.einsum("ij,bjhw->bihw", matrix, x), atol=1e-12)
    assert (layer(y) - x).abs().max() < 1e-11
    expected = 20 * torch.linalg.slogdet(matrix)[1]
    assert abs(layer.log_det(x) - expected) < 1e-10


def test_lu_ignores_what_is_outside_the_triangles() -> None:
    torch.manual_seed(0)
    layer = LUMixing(6).double()
    before = layer.matrices()[0]
    layer.lower.data += torch.randn(6, 6).double().triu()
    layer.upper.data += torch.randn(6, 6).double().tril()
    assert torch.equal(layer.matrices()[0], before)


def test_lu_rebuilds_a_given_matrix() -> None:
    """The order is that of rows: W = P L U."""
    torch.manual_seed(1)
    matrix = torch.randn(7, 7).double()
    permutation, lower, upper = torch.linalg.lu(matrix)
    layer = LUMixing(7).double()
    layer.lower.data, layer.upper.data = lower, upper
    layer.log_diagonal.data, layer.sign = upper.diagonal().abs().log(), upper.diagonal().sign()
    layer.order = permutation.argmax(1)
    assert (layer.matrices()[0] - matrix).abs().max() < 1e-12
    assert (layer.matrices()[1] - torch.linalg.inv(matrix)).abs().max() < 1e-10


def test_permutation() -> None:
    order = torch.tensor([2, 0, 3, 1])
    layer, x = ChannelPermutation(order), torch.randn(2, 4, 3, 3)
    y = layer.inverse(x)
    assert torch.equal(y[:, 0], x[:, 2])
    assert torch.equal(layer(y), x)
    matrix, inverse = layer.matrices()
    assert torch.equal(torch.einsum("ij,bjhw->bihw", matrix.float(), x), y)
    assert torch.equal(matrix @ inverse, torch.eye(4).double())
    assert torch.equal(layer.state_dict()["order"], order)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (2, 2), (5, 3)])
def test_border_map(height: int, width: int) -> None:
    """Against an input channel that is 1 beyond the border, and against padding with ones."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, height, width).double(), torch.randn(4, 3, 3, 3).double()
    taps = torch.randn(4, 3, 3).double()
    channel = F.pad(torch.zeros(2, 1, height, width).double(), (1, 1, 1, 1), value=1.0)
    widened = torch.cat([F.pad(x, (1, 1, 1, 1)), channel], 1)
    expected = F.conv2d(widened, torch.cat([weight, taps[:, None]], 1))
    found = F.conv2d(x, weight, padding=1) + border_map(taps, height, width)
    assert (found - expected).abs().max() < 1e-12
    ones = F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), weight)
    assert (F.conv2d(x, weight, padding=1) + border_map(weight.sum(1), height, width) - ones).abs().max() < 1e-12
