"""Affine coupling against its formula, its inverse, autograd's determinant and finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import coupling as coupling_file
from hflow_rt.kernels.channels import Elementwise
from hflow_rt.kernels.coupling import (
    LOG_SCALE_BOUND,
    SHIFT_BOUND,
    Form,
    Region,
    clipped,
    coupling,
    coupling_forward,
    coupling_inverse,
)

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
    s, b = clipped(wild, 2 * wild, None)
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


FORMS: list[Form] = ["clipped", "additive", "sigmoid", "exp_sigmoid"]
REGIONS = [Region(0, 3), Region(1, 3), Region(0, 2), Region(0, 3, 1, 1, 0), Region(0, 3, 2, 3, 1)]


def step(region: Region, form: Form, full: bool = True) -> list[Any]:
    """x, log-scale, shift, weight, bias, the weight's inverse, and the outer map's two, in float64."""
    rng = np.random.default_rng(len(form) + region.high)
    normal = lambda *size: torch.from_numpy(rng.standard_normal(size))  # noqa: E731
    size, net = (2, 3, 4, 5), (2, region.high - region.low, 4, 5)
    weight = torch.linalg.qr(normal(3, 3))[0] * 1.5 if full else torch.exp(normal(3))
    undo = torch.linalg.inv(weight) if full else 1 / weight
    log_scale = None if form == "additive" else 0.8 * normal(*net)
    return [normal(*size), log_scale, normal(*net), weight, normal(3), undo, normal(*size), 0.5 * normal(*size)]


def terms(form: Form, r: float, t: float) -> tuple[float, float]:
    """s and b, as the papers have them."""
    if form == "clipped":
        return max(-3.0, min(3.0, r)), max(-5.0, min(5.0, t))
    sigmoid = 1 / (1 + np.exp(-(r + 2)))
    return {"additive": 0.0, "sigmoid": -float(np.log(sigmoid)), "exp_sigmoid": -float(sigmoid)}[form], -t


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_boundary_is_its_formula(form: Form, region: Region) -> None:
    x, log_scale, shift, weight, bias, _, outer_shift, outer_log_scale = step(region, form)
    up, total = x.clone(), torch.zeros(2, dtype=torch.float64)
    down = x.clone()
    for b, c, i, j in np.ndindex(*x.shape):
        board = region.cell_height == 0 or (i // region.cell_height + j // region.cell_width) % 2 == region.parity
        if region.low <= c < region.high and board:
            at = (b, c - region.low, i, j)
            s, offset = terms(form, 0.0 if log_scale is None else float(log_scale[at]), float(shift[at]))
            up[b, c, i, j] = x[b, c, i, j] * np.exp(s) + offset
            down[b, c, i, j] = (x[b, c, i, j] - offset) * np.exp(-s)
            total[b] += s
    for inverse, moved in ((False, up), (True, down)):
        mixed = torch.einsum("oi,bihw->bohw", weight, moved) + bias.view(-1, 1, 1)
        last = torch.exp(-outer_log_scale) if inverse else torch.exp(outer_log_scale)
        expected = (mixed - outer_shift) * last if inverse else mixed * last + outer_shift
        post = Elementwise(outer_shift, outer_log_scale)
        y, log_det = coupling(x, log_scale, shift, weight, bias, region, inverse=inverse, form=form, post=post)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_det, -total if inverse else total, rtol=1e-12, atol=1e-12)


def test_the_clipped_step_is_the_clipped_coupling() -> None:
    x, log_scale, shift, *_ = step(Region(0, 3), "clipped")
    mask = Region(0, 3, 1, 1, 0).cells(x)
    assert mask is not None
    for inverse, couple in ((False, coupling_forward), (True, coupling_inverse)):
        found = coupling(
            x, log_scale, shift, None, None, Region(0, 3, 1, 1, 0), inverse=inverse, form="clipped"
        )  # fmt: skip
        for mine, other in zip(found, couple(x, log_scale, shift, mask.double()), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_operator_and_its_gradient(form: Form, inverse: bool) -> None:
    """The gradient is made from the result, so gradcheck also says that it is recomputed right."""
    for region, full in ((Region(1, 3), True), (Region(0, 3, 2, 2, 1), False)):
        tensors = [None if t is None else t.requires_grad_() for t in step(region, form, full)]
        tensors[5] = None  # left to the gradient
        given = [t for t in tensors if t is not None]

        def run(*values: Tensor, tensors: list[Any] = tensors, region: Region = region) -> tuple[Tensor, Tensor]:
            left = iter(values)
            arguments = [None if t is None else next(left) for t in tensors]
            y, log_det = coupling_file._coupling(*arguments, list(region), inverse, form)
            return y, log_det

        assert torch.autograd.gradcheck(run, given)


def test_operators_keep_their_promises() -> None:
    for form, region in (("clipped", Region(1, 3)), ("additive", Region(0, 3, 1, 1, 1))):
        tensors = step(region, form)  # type: ignore[arg-type]
        rest = (list(region), True, form)
        torch.library.opcheck(coupling_file._coupling_backward, (tensors[0], tensors[0][:, 0, 0, 0], *tensors, *rest))
        leaves = [None if t is None else t.requires_grad_(at != 5) for at, t in enumerate(tensors)]
        torch.library.opcheck(coupling_file._coupling, (*leaves, *rest))
        none: list[Any] = [None] * 5
        torch.library.opcheck(coupling_file._coupling, (*leaves[:3], *none, *rest))


def test_wrong_shapes_are_refused() -> None:
    x, log_scale, shift, *_ = step(Region(1, 3), "clipped")

    def run(r: Tensor | None, t: Tensor, form: Form = "clipped") -> None:
        coupling(x, r, t, None, None, Region(1, 3), inverse=False, form=form)

    with pytest.raises(ValueError, match="a coupling of form 'additive' needs no log-scale"):
        run(log_scale, shift, "additive")
    with pytest.raises(ValueError, match="a coupling of form 'sigmoid' needs a log-scale"):
        run(None, shift, "sigmoid")
    with pytest.raises(ValueError, match=r"the shift must be \[2, 3, 4, 5\], or channels 1 to 3 of it, not \[2, 1,"):
        run(log_scale, shift[:, :1])
    with pytest.raises(ValueError, match=r"the log-scale must be \[2, 2, 4, 5\] as the shift, not \[2, 1, 4, 5\]"):
        run(log_scale[:, :1], shift)
