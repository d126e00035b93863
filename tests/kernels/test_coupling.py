"""Affine coupling against its formula, its inverse, autograd's determinant and finite differences."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hflow_rt.kernels.coupling import LOG_SCALE_BOUND, SHIFT_BOUND, bound, coupling_forward, coupling_inverse

SIZES = [(1, 2), (3, 7), (1, 3, 1, 1), (2, 4, 5, 3), (4, 6, 16, 16)]


def inputs(size: tuple[int, ...], seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, raw log-scale, raw shift (some beyond their bounds) and a mask of zeros and ones, in float64."""
    rng = np.random.default_rng(seed)
    x, log_scale, shift = (spread * rng.standard_normal((3, *size)))[:]
    mask = rng.integers(0, 2, size[1:]).astype(np.float64)
    return tuple(torch.from_numpy(np.ascontiguousarray(values)) for values in (x, log_scale, shift, mask))  # type: ignore[return-value]


def plain(x: Tensor, log_scale: Tensor, shift: Tensor, mask: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Element by element: y = x e^s + b, and the sum of s."""
    y, total = np.empty(x.shape), np.zeros(len(x))
    for index in np.ndindex(*x.shape):
        keep = 1.0 if mask is None else float(mask[index[1:]])
        s = max(-3.0, min(3.0, keep * float(log_scale[index])))
        b = max(-5.0, min(5.0, keep * float(shift[index])))
        y[index] = float(x[index]) * np.exp(s) + b
        total[index[0]] += s
    return y, total


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", SIZES[:-1])
def test_forward_is_the_formula(size: tuple[int, ...], masked: bool) -> None:
    x, log_scale, shift, mask = inputs(size, seed=sum(size))
    y, log_det = coupling_forward(x, log_scale, shift, mask if masked else None)
    expected, total = plain(x, log_scale, shift, mask if masked else None)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(log_det.numpy(), total, rtol=1e-12, atol=1e-12)
    assert log_det.shape == (size[0],)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("size", SIZES)
def test_inverse_undoes_forward(size: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x, log_scale, shift, mask = (values.to(dtype) for values in inputs(size, seed=1))
    y, up = coupling_forward(x, log_scale, shift, mask)
    back, down = coupling_inverse(y, log_scale, shift, mask)
    assert (back - x).abs().max() < tolerance
    assert torch.equal(up, -down)
    assert back.dtype == up.dtype == dtype


def test_what_the_net_sees_passes_bit_for_bit() -> None:
    x, log_scale, shift, mask = (values.float() for values in inputs((2, 4, 8, 8), seed=2))
    for couple in (coupling_forward, coupling_inverse):
        y, _ = couple(x, log_scale, shift, mask)
        seen = (mask == 0).expand_as(x)
        assert torch.equal(y[seen], x[seen])
        assert (y[~seen] != x[~seen]).float().mean() > 0.99


def test_bounds_hold_for_any_net_output() -> None:
    wild = torch.tensor([[-1e30, -3.1, -2.9, 2.9, 3.1, 1e30]])
    s, b = bound(wild, 2 * wild, None)
    assert s.tolist() == [[-3.0, -3.0, pytest.approx(-2.9), pytest.approx(2.9), 3.0, 3.0]]
    assert b.tolist() == [[-5.0, -5.0, -5.0, 5.0, 5.0, 5.0]]
    assert (LOG_SCALE_BOUND, SHIFT_BOUND) == (3.0, 5.0)


@pytest.mark.parametrize("couple", [coupling_forward, coupling_inverse])
def test_log_det_is_that_of_the_jacobian(couple: object) -> None:
    assert callable(couple)
    x, log_scale, shift, mask = inputs((1, 3, 2, 2), seed=3)
    jacobian = torch.autograd.functional.jacobian(lambda v: couple(v, log_scale, shift, mask)[0], x)
    expected = torch.linalg.slogdet(jacobian.reshape(12, 12))[1]
    assert abs(float(couple(x, log_scale, shift, mask)[1]) - float(expected)) < 1e-12


@pytest.mark.parametrize("couple", [coupling_forward, coupling_inverse])
@pytest.mark.parametrize("size", [(2, 3), (2, 3, 2, 2)])
def test_gradients(couple: object, size: tuple[int, ...]) -> None:
    x, log_scale, shift, mask = inputs(size, seed=4, spread=0.8)
    # finite differences mean nothing across a bound
    assert log_scale.abs().max() < 2.99
    assert shift.abs().max() < 4.99
    arguments = [values.requires_grad_() for values in (x, log_scale, shift)]
    assert torch.autograd.gradcheck(lambda *values: couple(*values, mask), arguments)  # type: ignore[operator]
