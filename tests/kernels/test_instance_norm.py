"""Instance norm: unbiased variance, epsilon inside the root, and the folded form that engines know."""

import numpy as np
import pytest
import torch

from hflow_rt.kernels.instance_norm import EPSILON, instance_norm
from hflow_rt.layers.resample import FoldedInstanceNorm, InstanceNorm, norm_by_rows

SIZES = [(1, 1, 1, 2), (2, 3, 4, 4), (3, 5, 7, 2), (1, 2, 32, 32)]


def plain(x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    for b, c in np.ndindex(*x.shape[:2]):
        values = x[b, c]
        variance = ((values - values.mean()) ** 2).sum() / (values.size - 1)
        y[b, c] = (values - values.mean()) / np.sqrt(variance + 1e-6)
    return y


@pytest.mark.parametrize("spread", [1.0, 1e-3])  # at 1e-3 the epsilon counts as much as the variance
@pytest.mark.parametrize("size", SIZES)
def test_instance_norm_is_its_formula(size: tuple[int, ...], spread: float) -> None:
    x = 2 + spread * np.random.default_rng(sum(size)).standard_normal(size)
    expected = plain(x)
    np.testing.assert_allclose(instance_norm(torch.from_numpy(x)).numpy(), expected, rtol=1e-9, atol=1e-9)
    for folded in (FoldedInstanceNorm(), norm_by_rows):
        np.testing.assert_allclose(folded(torch.from_numpy(x)).numpy(), expected, rtol=1e-9, atol=1e-9)
    single = instance_norm(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-5 / spread)


def test_a_flat_channel_becomes_zero() -> None:
    assert torch.equal(instance_norm(torch.full((1, 2, 4, 4), 3.0)), torch.zeros(1, 2, 4, 4))
    assert EPSILON == 1e-6


@pytest.mark.parametrize("layer", [InstanceNorm(), FoldedInstanceNorm()])
def test_a_single_pixel_passes(layer: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 1, 1)
    assert torch.equal(layer(x), x)


def test_gradients() -> None:
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(instance_norm, x)
    assert torch.autograd.gradgradcheck(instance_norm, x)


def test_half_precision_keeps_float32_statistics() -> None:
    x = 100 + torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    half = x.to(torch.bfloat16)
    found = instance_norm(half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), instance_norm(half.float()), rtol=1e-2, atol=1e-2)
