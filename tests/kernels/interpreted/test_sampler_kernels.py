"""The kernels of models of many steps against plain torch in float64, and IHDM on them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import dispatch, group_norm, sampler_update
from hflow_rt.kernels.group_norm import group_norm_silu
from hflow_rt.kernels.sampler_update import sampler_update_reference
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.graphs import Change, Step, folded_network, level_table
from hflow_rt.models.ihdm.model import IHDM
from hflow_rt.models.ihdm.presets import TINY

AsGood = Callable[..., None]
# size, channels of the other tensor, groups, what the level has beside channels, pixels of a part
CASES: list[tuple[tuple[int, ...], int, int, tuple[int, ...] | None, int]] = [
    ((3, 6, 5, 3), 0, 2, (3,), 2048),
    ((2, 8, 4, 4), 4, 4, None, 2048),  # a group lies in both
    ((1, 3, 7, 9), 5, 4, (1,), 16),  # parts of planes
    ((2, 4, 6, 5), 0, 4, (), 8),  # one channel a group
]


def draw(case: Any, dtype: torch.dtype, device: str, mean: float = 2.0) -> list[Tensor | None]:
    """x, skip, level, weight and bias."""
    size, more, _, beside, _ = case
    generator = torch.Generator().manual_seed(sum(size))
    channels = size[1] + more

    def normal(*of: int) -> Tensor:
        return torch.randn(of, generator=generator)

    x, skip = mean + normal(*size), mean + normal(size[0], more, *size[2:]) if more else None
    level = None if beside is None else normal(*beside, channels)
    made = [x, skip, level, 1 + 0.3 * normal(channels), normal(channels)]
    return [None if t is None else t.to(dtype).to(device) for t in made]


def everything(tensors: list[Tensor | None], groups: int, plain: bool = False) -> list[Tensor]:
    """The result, then the gradients by all that took part."""
    x, skip, level, weight, bias = leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with dispatch.using("reference" if plain else "triton"):
        y = group_norm_silu(x, weight, bias, groups, skip=skip, level=level)  # type: ignore[arg-type]
        above = (1 + torch.arange(y.numel(), dtype=torch.float64).sin()).view(y.shape).to(y.dtype).to(y.device)
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], above)]


def compare(case: Any, tensors: list[Tensor | None], as_good: AsGood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "PART", case[-1])
    found, plain = everything(tensors, case[2]), everything(tensors, case[2], plain=True)
    truth = everything([None if t is None else t.double() for t in tensors], case[2], plain=True)
    assert len(found) == len(truth)
    for mine, right, torchs in zip(found, truth, plain, strict=True):
        as_good(mine, right, torchs, ulps=4)


@pytest.mark.parametrize("case", CASES)
def test_group_norm(case: Any, device: str, as_good: AsGood, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(case, draw(case, torch.float32, device), as_good, monkeypatch)


def test_a_large_mean_costs_no_more_than_it_must(device: str, as_good: AsGood, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(CASES[1], draw(CASES[1], torch.float32, device, mean=1000.0), as_good, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: str, as_good: AsGood, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(CASES[2], draw(CASES[2], dtype, device), as_good, monkeypatch)


def test_strided_inputs_and_gradients(laid_out: Callable[[Tensor], Tensor], device: str) -> None:
    x, skip, _, weight, bias = draw(CASES[1], torch.float32, device)

    def run(x: Tensor, skip: Tensor, above: Tensor) -> list[Tensor]:
        x, skip = x.detach().requires_grad_(), skip.detach().requires_grad_()
        y = group_norm_silu(x, weight, bias, 4, skip=skip)  # type: ignore[arg-type]
        return [y.detach(), *torch.autograd.grad(y, (x, skip), above)]

    assert x is not None
    assert skip is not None
    above = torch.cat([x, skip], 1)
    packed = run(x, skip, above)
    for found, expected in zip(run(laid_out(x), laid_out(skip), laid_out(above)), packed, strict=True):
        assert torch.equal(found, expected)


def test_two_runs_agree_bit_for_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "PART", 16)
    runs = [everything(draw(CASES[2], torch.float32, device), 4) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_wrong_shapes_are_refused(device: str) -> None:
    x, w = torch.zeros(2, 6, 3, 3, device=device), torch.zeros(6, device=device)
    with pytest.raises(ValueError, match="4 groups must divide 6 channels"):
        group_norm_silu(x, w, w, 4)
    with pytest.raises(ValueError, match=r"the level must be \[6\] or \[2, 6\], not \[3, 6\]"):
        group_norm_silu(x, w, w, 2, level=w.expand(3, 6))
    with pytest.raises(ValueError, match=r"skip must be like \[2, 6, 3, 3\] but for its channels, not \[2, 6, 3, 2\]"):
        group_norm_silu(x, w, w, 2, skip=x[..., :2])
    with pytest.raises(ValueError, match=r"weight and bias must be \[6\], not \[5\]"):
        group_norm_silu(x, w[:5], w, 2)


def test_an_update(device: str, as_good: AsGood) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, 3, 19, 20, generator=generator).to(device) for _ in range(4)]
    inputs += [torch.randn(2, generator=generator).to(device), torch.randn(1, generator=generator).to(device)]

    def run(inputs: list[Tensor], update: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        made, image = update(*leaves)
        slopes = torch.autograd.grad((made * made.detach() + 3 * image).sum(), leaves)
        return [made.detach(), image.detach(), *slopes]

    found, plain = run(inputs, sampler_update.sampler_update), run(inputs, sampler_update_reference)
    truth = run([t.double() for t in inputs], sampler_update_reference)
    for mine, right, torchs in zip(found, truth, plain, strict=True):
        as_good(mine, right, torchs, ulps=4)


def make(device: str) -> IHDM:
    """Nothing left at zero."""
    torch.manual_seed(1)
    model = IHDM(IHDMConfig(**(TINY["model"] | {"linear_skip": False, "dropout": 0.0}))).to(device)
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data = 0.1 * torch.randn(parameter.shape).to(device)
    return model


@pytest.fixture
def launched(launched_by: Callable[..., list[str]]) -> list[str]:
    """Names of the kernels launched so far."""
    return launched_by(group_norm, sampler_update)


def test_ihdm_trains_and_steps_on_the_kernels(device: str, launched: list[str]) -> None:
    """Every norm that SiLU follows, halves of the channels where they are, and the end of a step."""
    model = make(device)
    generator = torch.Generator().manual_seed(3)
    images, noise, u = (torch.randn(2, *model.config.image_shape, generator=generator).to(device) for _ in range(3))
    level = torch.tensor([1, model.config.steps], device=device)
    row = level_table(model.network)[2:3].to(device)
    step = Step(Change(folded_network(model.network), None))

    def run() -> list[Tensor]:
        loss = model.errors(images, level, noise).sum()
        slopes = torch.autograd.grad(loss, list(model.network.parameters()))
        with torch.no_grad():
            stepped = step(u, noise, images, row, torch.ones(1, device=device), torch.full((2,), 0.25, device=device))
        return [loss.detach(), *slopes, *stepped]

    found = run()
    norms = 2 * len(model.network.blocks()) + 1
    assert launched.count("_norm_silu") == 2 * norms
    assert launched.count("_norm_silu_gradient") == 2 * norms
    assert launched.count("_update_kernel") == 1
    launched.clear()
    with dispatch.using("reference"):
        expected = run()
    assert launched == []
    # a bias before a norm of one channel a group has no effect: its gradient is rounding
    largest = max(float(torchs.abs().max()) for torchs in expected[1:-2])
    for mine, torchs in zip(found[:-2], expected[:-2], strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5 * largest)
    for mine, torchs in zip(found[-2:], expected[-2:], strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-5)
