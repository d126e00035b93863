"""The mixing's Triton kernels against plain torch in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import dispatch
from hflow_rt.kernels import mixing as mixing_file
from hflow_rt.kernels.channels import Elementwise
from hflow_rt.kernels.mixing import mixing, mixing_reference

AsGood = Callable[..., None]
SIZES = [(1, 1, 1, 3), (5, 2, 3, 1), (2, 3, 7, 9), (1, 4, 5, 6), (2, 5, 3, 3), (1, 8, 4, 4)]
KINDS = [("full", False, False), ("full", True, True), ("diagonal", True, True), ("diagonal", False, False)]


def draw(size: tuple[int, ...], kind: str, bias: bool, pre: bool, device: str) -> list[Any]:
    """x, weight, bias, and the shift and log-scale of the outer map."""
    generator = torch.Generator().manual_seed(sum(size))
    normal = lambda *sides: torch.randn(*sides, generator=generator).to(device)  # noqa: E731
    weight = normal(size[1], size[1]) if kind == "full" else normal(size[1])
    outer = (normal(*size), 0.5 * normal(*size)) if pre else (None, None)
    return [normal(*size), weight, normal(size[1]) if bias else None, *outer]


def everything(f: Callable[..., Tensor], tensors: list[Any], inverse: bool) -> list[Tensor]:
    """The result, then the gradients by all that took part."""
    given = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = f(*given[:3], pre=None if given[3] is None else Elementwise(*given[3:]), inverse=inverse)
    above = (1 + torch.arange(y.numel(), dtype=torch.float64).sin()).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, [t for t in given if t is not None], above)]


def compare(tensors: list[Any], inverse: bool, as_good: AsGood) -> None:
    assert dispatch.takes(tensors[0])
    truth = everything(mixing_reference, [None if t is None else t.double() for t in tensors], inverse)
    for mine, right, plain in zip(
        everything(mixing, tensors, inverse), truth, everything(mixing_reference, tensors, inverse), strict=True
    ):
        assert mine.dtype == plain.dtype
        as_good(mine, right, plain, ulps=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inverse", [False, True])
def test_result_and_gradients(inverse: bool, size: tuple[int, ...], kind: Any, device: str, as_good: AsGood) -> None:
    compare(draw(size, *kind, device), inverse, as_good)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tiles(kind: Any, device: str, as_good: AsGood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing_file, "LANES", 16)
    monkeypatch.setattr(mixing_file, "LANES_BACKWARD", 8)
    tensors = draw((2, 3, 5, 7), *kind, device)
    compare(tensors, True, as_good)
    one, two = (everything(mixing, tensors, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("channels", [13, 16, 24])
def test_more_channels_than_a_program_sums(channels: int, device: str, as_good: AsGood) -> None:
    tensors = draw((1, channels, 3, 5), "full", True, True, device)
    compare(tensors, False, as_good)
    with torch.no_grad():  # up to 16 in a lane's registers after all
        found = mixing(*tensors[:3], pre=Elementwise(*tensors[3:]))
    truth = mixing_reference(*(t.double() for t in tensors[:3]), pre=Elementwise(*(t.double() for t in tensors[3:])))
    plain = mixing_reference(*tensors[:3], pre=Elementwise(*tensors[3:]))
    as_good(found, truth, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
def test_outer_maps_of_half_precision(inverse: bool, dtype: torch.dtype, device: str, as_good: AsGood) -> None:
    tensors = draw((2, 3, 4, 5), "full", True, True, device)
    compare([*tensors[:3], *(t.to(dtype) for t in tensors[3:])], inverse, as_good)


def test_strided_inputs_and_gradients(laid_out: Callable[[Tensor], Tensor], device: str) -> None:
    x, weight, bias, shift, log_scale = draw((2, 3, 5, 6), "full", True, True, device)

    def run(lay: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [lay(t).detach().requires_grad_() for t in (x, shift, log_scale)]
        w = weight.T.contiguous().T.requires_grad_()
        y = mixing(leaves[0], w, bias, pre=Elementwise(*leaves[1:]))
        return [y.detach(), *torch.autograd.grad(y, [*leaves, w], lay(shift))]

    for found, expected in zip(run(laid_out), run(Tensor.contiguous), strict=True):
        assert torch.equal(found, expected)


def test_operators_keep_their_promises(device: str) -> None:
    tensors = draw((2, 3, 3, 5), "full", True, True, device)
    torch.library.opcheck(mixing_file._mixing_backward, (tensors[0], *tensors, True))
    torch.library.opcheck(mixing_file._mixing, (*(t.requires_grad_() for t in tensors), False))
