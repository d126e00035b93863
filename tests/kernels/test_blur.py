"""The two blurs against their sums, written out sample by sample."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hflow_rt.kernels.blur import blur_down, blur_up

Rows = NDArray[np.float64]
SIZES = [(1, 1, 2, 2), (2, 3, 4, 4), (1, 5, 8, 6), (3, 2, 16, 16)]


def along(x: Rows, axis: int, line: Callable[[Rows], Rows]) -> Rows:
    return np.apply_along_axis(line, axis, x)


def down(x: Rows) -> Rows:
    """out[m] = (x[2m-1] + 3 x[2m] + 3 x[2m+1] + x[2m+2]) / 8 with x[-1] = x[1] and x[n] = x[n-2]."""
    n = len(x)
    at = lambda i: x[1] if i < 0 else x[n - 2] if i >= n else x[i]  # noqa: E731
    return np.array([(at(2 * m - 1) + 3 * at(2 * m) + 3 * at(2 * m + 1) + at(2 * m + 2)) / 8 for m in range(n // 2)])


def up(x: Rows) -> Rows:
    """out[2m] = (x[m-1] + 3 x[m]) / 4, out[2m+1] = (3 x[m] + x[m+1]) / 4 with x[-1] = x[0] and x[n] = x[n-2]."""
    n = len(x)
    at = lambda i: x[0] if i < 0 else x[n - 2] if i >= n else x[i]  # noqa: E731
    pairs = [((at(m - 1) + 3 * at(m)) / 4, (3 * at(m) + at(m + 1)) / 4) for m in range(n)]
    return np.array([value for pair in pairs for value in pair])


@pytest.mark.parametrize(("blur", "line"), [(blur_down, down), (blur_up, up)])
@pytest.mark.parametrize("size", SIZES)
def test_blur_is_its_sum(
    blur: Callable[[torch.Tensor], torch.Tensor], line: Callable[[Rows], Rows], size: tuple[int, ...]
) -> None:
    x = np.random.default_rng(sum(size)).standard_normal(size)
    expected = along(along(x, 2, line), 3, line)
    found = blur(torch.from_numpy(x))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-14)
    single = blur(torch.from_numpy(x).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("blur", [blur_down, blur_up])
def test_a_constant_stays_and_channels_stay_apart(blur: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 8, 8)
    found = blur(x)
    assert torch.allclose(found, x[..., :1, :1].expand_as(found), atol=1e-6)


@pytest.mark.parametrize("blur", [blur_down, blur_up])
def test_gradients(blur: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(blur, x)
