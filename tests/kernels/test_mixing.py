"""The 1x1 map over channels in plain torch: its formula, what it refuses, and its operator."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import mixing as mixing_file
from hflow_rt.kernels.channels import Elementwise
from hflow_rt.kernels.mixing import mixing


def draw(size: tuple[int, ...], full: bool = True) -> list[Tensor]:
    """x, weight, bias, and the shift and log-scale of the outer map, in float64."""
    rng = np.random.default_rng(sum(size))
    channels = size[1]
    sides = (size, (channels, channels) if full else (channels,), (channels,), size, size)
    return [torch.from_numpy(rng.standard_normal(side)) for side in sides]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("size", [(2, 3), (2, 3, 4, 5), (1, 1, 2, 2), (3, 20, 2, 1)])
def test_mixing_is_its_formula(size: tuple[int, ...], full: bool, inverse: bool) -> None:
    x, weight, bias, shift, log_scale = draw(size, full)
    found = mixing(x, weight, bias, pre=Elementwise(shift, log_scale), inverse=inverse)
    values, scale, matrix = x.numpy(), np.exp(log_scale.numpy()), (weight if full else torch.diag(weight)).numpy()
    inner = (values - shift.numpy()) / scale if inverse else values * scale + shift.numpy()
    expected = np.einsum("oi,bi...->bo...", matrix, inner) + bias.view(-1, *[1] * (len(size) - 2)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(mixing(x, weight), np.einsum("oi,bi...->bo...", matrix, values), atol=1e-12)


def test_wrong_shapes_are_refused() -> None:
    x, weight, bias, shift, log_scale = draw((2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"the channel map must be \[3, 3\] or \[3\], not \[2, 3\]"):
        mixing(x, weight[:2])
    with pytest.raises(ValueError, match=r"the bias must be \[3\] and come with a weight, not \[2\]"):
        mixing(x, weight, bias[:2])
    with pytest.raises(ValueError, match=r"maps of elements must be \[2, 3, 4, 5\], not \[1, 3, 4, 5\]"):
        mixing(x, weight, pre=Elementwise(shift, log_scale[:1]))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("full", [True, False])
def test_operator_and_its_gradient(full: bool, inverse: bool) -> None:
    everything = [t.requires_grad_() for t in draw((2, 2, 3, 2), full)]
    for tensors in (everything, [*everything[:2], None, None, None]):
        torch.library.opcheck(mixing_file._mixing, (*tensors, inverse))
        given = [t for t in tensors if t is not None]

        def run(*a: Tensor) -> Tensor:
            y: Tensor = mixing_file._mixing(*a, *[None] * (5 - len(a)), inverse)
            return y

        assert torch.autograd.gradcheck(run, given)
