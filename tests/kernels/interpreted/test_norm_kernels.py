"""The instance norm's Triton kernels against plain torch in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import dispatch, instance_norm, moments
from hflow_rt.kernels.instance_norm import instance_norm_act, instance_norm_act_reference

AsGood = Callable[..., None]
SIZES = [(5, 3, 3, 5), (1, 3, 9, 7)]
OPTIONS = list(itertools.product([False, True], repeat=3))  # style, leaky, residual


@pytest.fixture(params=["whole planes", "parts of planes"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "parts of planes":
        monkeypatch.setattr(instance_norm, "WHOLE", 1)
        monkeypatch.setattr(instance_norm, "PART", 16)


def draw(size: tuple[int, ...], dtype: torch.dtype, device: str, mean: float = 2.0) -> list[Tensor]:
    """x, scale, shift (halves of one tensor, as a linear layer gives them) and residual."""
    generator = torch.Generator().manual_seed(sum(size))
    x = mean + torch.randn(size, generator=generator)
    style = torch.randn(size[0], 2 * size[1], generator=generator)
    residual = torch.randn(size, generator=generator)
    return [*(t.to(dtype).to(device) for t in (x, *style.chunk(2, 1), residual))]


def everything(f: Callable[..., Tensor], tensors: list[Tensor], style: bool, leaky: bool, residual: bool) -> Any:
    """The result, then the gradients by all that took part."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    x, scale, shift, more = tensors
    used = [x, *((scale, shift) if style else ()), *((more,) if residual else ())]
    options = {"leaky": leaky, "residual": more if residual else None}
    y = f(x, scale, shift, **options) if style else f(x, **options)
    above = (1 + torch.arange(y.numel(), dtype=torch.float64).sin()).view(y.shape).to(y.dtype).to(y.device)
    return [y.detach(), *torch.autograd.grad(y, used, above)]


def compare(tensors: list[Tensor], options: tuple[bool, bool, bool], as_good: AsGood) -> None:
    assert dispatch.takes(tensors[0])
    found = everything(instance_norm_act, tensors, *options)
    truth = everything(instance_norm_act_reference, [t.double() for t in tensors], *options)
    plain = everything(instance_norm_act_reference, tensors, *options)
    assert len(found) == len(truth)
    for mine, right, torchs in zip(found, truth, plain, strict=True):
        assert mine.dtype == torchs.dtype
        as_good(mine, right, torchs, ulps=4 if mine.dim() == 2 else 1)  # gradients of style are sums of many terms


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_result_and_gradients(
    size: tuple[int, ...], options: tuple[bool, bool, bool], device: str, as_good: AsGood
) -> None:
    compare(draw(size, torch.float32, device), options, as_good)


def test_two_pixels(device: str, as_good: AsGood) -> None:
    compare(draw((1, 1, 1, 2), torch.float32, device), OPTIONS[-1], as_good)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]])
def test_half_precision(dtype: torch.dtype, options: tuple[bool, bool, bool], device: str, as_good: AsGood) -> None:
    compare(draw((2, 3, 6, 5), dtype, device), options, as_good)


@pytest.mark.usefixtures("tiles")
def test_strided_inputs_and_gradients(laid_out: Callable[[Tensor], Tensor], device: str) -> None:
    x, scale, shift, residual = draw((1, 3, 5, 6), torch.float32, device)

    def run(*tensors: Tensor) -> list[Tensor]:
        tensors = tuple(t.detach().requires_grad_() for t in tensors)
        x, scale, shift, residual, above = tensors
        y = instance_norm_act(x, scale, shift, residual=residual, leaky=True)
        return [y.detach(), *torch.autograd.grad(y, tensors[:4], above.detach())]

    packed = run(x, scale.contiguous(), shift.contiguous(), residual, x)
    for style in ((scale, shift), (scale.contiguous(), shift), (scale.T.contiguous().T, shift)):
        for found, expected in zip(run(laid_out(x), *style, laid_out(residual), laid_out(x)), packed, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.usefixtures("tiles")
def test_given_moments_are_used_and_gradients_stay_whole(device: str, as_good: AsGood) -> None:
    x, scale, shift, _ = draw((2, 3, 4, 6), torch.float32, device)
    known = moments.moments_reference(x)
    tensors, options = [x, scale, shift, x], (True, True, False)
    given = everything(lambda *a, **k: instance_norm_act(*a, moments=known, **k), tensors, *options)
    truth = everything(instance_norm_act_reference, [t.double() for t in tensors], *options)
    plain = everything(instance_norm_act_reference, tensors, *options)
    for mine, right, torchs in zip(given, truth, plain, strict=True):
        as_good(mine, right, torchs, ulps=4 if mine.dim() == 2 else 1)
    shifted = instance_norm_act(x, moments=known + 1)
    assert not torch.allclose(shifted, instance_norm_act(x))


@pytest.mark.usefixtures("tiles")
def test_a_large_mean_costs_no_more_than_it_must(device: str, as_good: AsGood) -> None:
    compare(draw((1, 2, 8, 8), torch.float32, device, mean=1000.0), OPTIONS[0], as_good)


@pytest.mark.usefixtures("tiles")
def test_two_runs_agree_bit_for_bit(device: str) -> None:
    tensors = draw((2, 2, 5, 7), torch.float32, device)
    runs = [everything(instance_norm_act, tensors, True, True, True) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_operators_keep_their_promises(device: str) -> None:
    x, scale, shift, residual = (t.requires_grad_() for t in draw((2, 3, 3, 5), torch.float32, device))
    known = moments.moments_reference(x.detach())
    torch.library.opcheck(instance_norm._norm, (x, None, None, None, None, False))
    torch.library.opcheck(instance_norm._norm, (x, scale, shift, residual, None, True))
    torch.library.opcheck(instance_norm._norm, (x, None, None, None, known, False))
    x = x.detach()
    torch.library.opcheck(instance_norm._norm_backward, (x, x, None, None, known, False, False))
    torch.library.opcheck(instance_norm._norm_backward, (x, x, scale.detach(), shift.detach(), known, True, True))


def test_wrong_shapes_are_refused(device: str) -> None:
    x, scale, shift, residual = draw((2, 3, 3, 5), torch.float32, device)
    with pytest.raises(ValueError, match="scale and shift together"):
        instance_norm_act(x, scale)
    with pytest.raises(ValueError, match=r"scale and shift must be \[2, 3\], not \[2, 2\]"):
        instance_norm_act(x, scale[:, :2], shift[:, :2])
    with pytest.raises(ValueError, match=r"the residual must be \[2, 3, 3, 5\], not \[1, 3, 3, 5\]"):
        instance_norm_act(x, residual=residual[:1])
