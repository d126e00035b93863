"""The blurs' Triton kernels against plain torch in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import blur, dispatch
from hflow_rt.kernels.blur import blur_down, blur_down_moments, blur_up, blur_up_moments
from hflow_rt.kernels.moments import moments_reference

Blur = Callable[[Tensor], Tensor]
AsGood = Callable[..., None]
REFERENCE: dict[Blur, Blur] = {blur_down: blur.blur_down_reference, blur_up: blur.blur_up_reference}
MOMENTS = {blur_down: blur_down_moments, blur_up: blur_up_moments}
BLURS = [blur_down, blur_up]
SIZES = [(1, 1, 2, 2), (5, 3, 2, 4), (1, 5, 3, 5), (2, 7, 9, 6)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles along every axis of a small tensor."""
    monkeypatch.setattr(blur, "LANES", 4)
    monkeypatch.setattr(blur, "DEPTH", 3)


def draw(size: tuple[int, ...], dtype: torch.dtype, device: str, mean: float = 0.0) -> Tensor:
    return (mean + torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))).to(dtype).to(device)


def both(f: Blur, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of a sum of it weighted unlike anywhere else."""
    x = x.detach().requires_grad_()
    y = f(x)
    weights = torch.arange(y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype).to(y.device)
    (grad,) = torch.autograd.grad(y, x, weights)
    return y.detach(), grad


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("f", BLURS)
def test_many_tiles(f: Blur, device: str, as_good: AsGood) -> None:
    test_result_and_gradient(f, (1, 2, 6, 7), device, as_good)


@pytest.mark.parametrize("f", BLURS)
@pytest.mark.parametrize("size", SIZES)
def test_result_and_gradient(f: Blur, size: tuple[int, ...], device: str, as_good: AsGood) -> None:
    x = draw(size, torch.float32, device)
    assert dispatch.takes(x)
    found, truth, plain = both(f, x), both(REFERENCE[f], x.double()), both(REFERENCE[f], x)
    for mine, right, torchs in zip(found, truth, plain, strict=True):
        as_good(mine, right, torchs)
        assert mine.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("f", BLURS)
def test_half_precision(f: Blur, dtype: torch.dtype, device: str, as_good: AsGood) -> None:
    x = draw((1, 3, 6, 5), dtype, device)
    found, truth, plain = both(f, x), both(REFERENCE[f], x.double()), both(REFERENCE[f], x)
    for mine, right, torchs in zip(found, truth, plain, strict=True):
        assert mine.dtype == dtype
        as_good(mine, right, torchs)


@pytest.mark.parametrize("f", BLURS)
def test_strided_inputs_and_gradients(f: Blur, laid_out: Blur, device: str) -> None:
    x = draw((2, 3, 4, 6), torch.float32, device)
    strided = laid_out(x).requires_grad_()
    y = f(strided)
    assert torch.equal(y, f(x))
    above = draw(tuple(y.shape), torch.float32, device)
    (from_strided,) = torch.autograd.grad(y, strided, laid_out(above), retain_graph=True)
    assert torch.equal(from_strided, torch.autograd.grad(y, strided, above, retain_graph=True)[0])
    (from_sum,) = torch.autograd.grad(y.sum(), strided)  # its gradient has no strides at all
    x.requires_grad_()
    assert torch.allclose(from_sum, torch.autograd.grad(REFERENCE[f](x).sum(), x)[0], atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("f", BLURS)
def test_moments_of_many_tiles(f: Blur, device: str) -> None:
    test_moments(f, (1, 2, 7, 8), 1000.0, device)


@pytest.mark.parametrize("mean", [0.0, 1000.0])  # where a sum of squares would be all rounding
@pytest.mark.parametrize("f", BLURS)
@pytest.mark.parametrize("size", [(5, 3, 4, 4)])
def test_moments(f: Blur, size: tuple[int, ...], mean: float, device: str) -> None:
    x = draw(size, torch.float32, device, mean)
    y, moments = MOMENTS[f](x)
    assert torch.equal(y, f(x))
    truth = moments_reference(y.double())
    assert moments.dtype == torch.float32
    assert (moments[..., 0] - truth[..., 0]).abs().max() <= 4e-7 * max(1, mean)
    assert (moments[..., 1] / truth[..., 1] - 1).abs().max() <= (1e-6 if mean == 0 else 3e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", BLURS)
def test_moments_are_those_of_what_was_stored(f: Blur, dtype: torch.dtype, device: str) -> None:
    y, moments = MOMENTS[f](draw((1, 2, 4, 4), dtype, device, 3.0))
    assert torch.allclose(moments.double(), moments_reference(y.double()), rtol=2e-6)
    assert not moments.requires_grad


@pytest.mark.parametrize("f", BLURS)
def test_two_runs_agree_bit_for_bit(f: Blur, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(blur, "DEPTH", 2)
    x = draw((2, 3, 6, 6), torch.float32, device)
    for one, two in zip((*both(f, x), *MOMENTS[f](x)), (*both(f, x), *MOMENTS[f](x)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("f", BLURS)
def test_second_derivative(f: Blur, device: str) -> None:
    x = draw((1, 2, 4, 5), torch.float32, device).requires_grad_()
    y = f(x)
    above = draw(tuple(y.shape), torch.float32, device).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, above, create_graph=True)
    (second,) = torch.autograd.grad(grad, above, x.detach())  # a linear map: its transpose's transpose
    assert torch.allclose(second, y.detach(), atol=1e-6)


@pytest.mark.parametrize("f", BLURS)
def test_a_side_of_one_is_refused(f: Blur, device: str) -> None:
    with pytest.raises(ValueError, match=r"sides of at least 2, not \[1, 2, 4, 1\]"):
        f(draw((1, 2, 4, 1), torch.float32, device))


def test_operators_keep_their_promises(device: str) -> None:
    x = draw((1, 2, 4, 4), torch.float32, device).requires_grad_()
    torch.library.opcheck(blur._down, (x, False))
    torch.library.opcheck(blur._up, (x, True))
    torch.library.opcheck(blur._down_adjoint, (x, 9, 8))
    torch.library.opcheck(blur._up_adjoint, (x,))
