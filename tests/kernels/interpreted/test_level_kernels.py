"""The flow of a level on the kernels: both directions and a step's gradients, as trained and folded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hflow_rt.kernels import blur, coupling_kernels, dispatch, instance_norm, mixing
from hflow_rt.layers.actnorm import data_init
from hflow_rt.layers.fold import folded_copy
from hflow_rt.models.hflow.config import LevelConfig
from hflow_rt.models.hflow.flow import FlowResult, LevelFlow, Theta
from hflow_rt.models.hflow.folded import FOLDS


@contextmanager
def plain_torch() -> Iterator[None]:
    asked = dispatch._asked
    dispatch._asked = "reference"
    try:
        yield
    finally:
        dispatch._asked = asked


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels of flow steps launched so far. Nets stay plain torch, which is what takes the time."""
    for module in (blur, instance_norm):
        monkeypatch.setattr(module, "takes", lambda x: False)
    found: list[str] = []

    def noted(kernel: Any, *rest: Any, **arguments: Any) -> None:
        found.append(kernel.fn.__name__)
        dispatch.launch(kernel, *rest, **arguments)

    for module in (coupling_kernels, mixing):
        monkeypatch.setattr(module, "launch", noted)
    return found


def level(device: str, split: str = "hblocks-lblocks-blocks-channels", unitary: bool = False) -> LevelFlow:
    torch.manual_seed(0)
    settings = {
        "resolution": 16, "channels": 3, "steps": 4, "split": split, "unitary": unitary, "coupling_channels": 4,
        "encoder_channels": 4, "decoder_channels": 4, "condition_channels": 4, "skip_channels": 3, "noise": 0.2,
    }  # fmt: skip
    flow = LevelFlow(LevelConfig(**settings))
    for parameter in flow.parameters():  # nothing at rest
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return flow.to(device)


def draw(device: str) -> tuple[Tensor, Theta, Tensor]:
    """x, theta and condition."""
    generator = torch.Generator().manual_seed(1)
    x, condition, *theta = (torch.randn(2, c, 16, 16, generator=generator).to(device) for c in (3, 4, 3, 3, 3, 3))
    return x, Theta(*(0.3 * values for values in theta)), condition


def pieces(run: FlowResult) -> list[Tensor]:
    return [run.value, run.coupling, run.actnorm, run.mixing, run.theta]


def near(found: list[Tensor], expected: list[Tensor], bound: float = 2e-5) -> None:
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape
        assert mine.dtype == right.dtype
        assert (mine - right).abs().max() <= bound * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("unitary", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_both_directions(folded: bool, unitary: bool, launched: list[str], device: str) -> None:
    flow: Any = level(device, unitary=unitary).requires_grad_(False)
    x, theta, condition = draw(device)
    with plain_torch():
        truth = folded_copy(nn.ModuleList([flow]), FOLDS).double()[0] if folded else flow.double()
        wide = [t.double() for t in (x, *theta, condition)]
        latent = truth.encode(wide[0], Theta(*wide[1:5]), wide[5])
        target = truth.decode(wide[0], Theta(*wide[1:5]), wide[5])
    assert launched == []
    flow = truth.float()
    found = flow.encode(x, theta, condition)
    assert launched == ["_mix", *["_couple"] * 4]
    near([t.double() for t in pieces(found)], pieces(latent))
    near([t.double() for t in pieces(flow.decode(x, theta, condition))], pieces(target))
    back = flow.decode(found.value, theta, condition)
    near([back.value, back.log_det], [x, -found.log_det])


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_a_step(inverse: bool, launched: list[str], device: str) -> None:
    flow = level(device)
    x, theta, condition = draw(device)

    def step(flow: LevelFlow, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, *theta, condition)]
        run = (flow.encode if inverse else flow.decode)(leaves[0], Theta(*leaves[1:5]), leaves[5])
        loss = 0.5 * run.value.square().sum() - run.log_det.sum()
        used = [*leaves, *flow.parameters()]
        gradients = torch.autograd.grad(loss, used, allow_unused=True)
        return [loss.detach(), *(g for g in gradients if g is not None)]

    found = step(flow, torch.float32)
    assert launched == ["_mix", *["_couple"] * 4, *["_couple_gradient"] * 4, "_mix_gradient"]
    with plain_torch():
        plain = step(flow, torch.float32)
        truth = step(flow.double(), torch.float64)
    assert len(found) == len(truth) > 50
    for mine, right, torchs in zip(found, truth, plain, strict=True):
        allowed = 4 * float((torchs - right).abs().max()) + 1e-5 * max(1.0, float(right.abs().max()))
        assert (mine - right).abs().max() <= allowed


def test_actnorms_that_wait_for_data_see_it(launched: list[str], device: str) -> None:
    """Step by step, for no map is known before; the mixings are kernels all the same."""
    x, theta, condition = draw(device)
    fresh, same = level(device, "blocks-channels"), level(device, "blocks-channels")
    with plain_torch(), data_init(same):
        same.encode(x, theta, condition)
    with data_init(fresh):
        fresh.encode(x, theta, condition)
    assert launched == ["_mix"] * 4
    near([p.detach() for p in fresh.parameters()], [p.detach() for p in same.parameters()])


def test_nets_under_autocast_stay_half(launched: list[str], device: str) -> None:
    flow: Any = level(device, "blocks-channels").requires_grad_(False)
    x, theta, condition = draw(device)
    with torch.autocast(device, torch.bfloat16):
        found = flow.encode(x, Theta(*(t.bfloat16() for t in theta)), condition)
    assert launched == ["_mix", *["_couple"] * 4]
    assert {t.dtype for t in (*pieces(found), found.log_det)} == {torch.float32}
    with plain_torch(), torch.autocast(device, torch.bfloat16):
        plain = flow.encode(x, Theta(*(t.bfloat16() for t in theta)), condition)
    near([found.log_det], [plain.log_det], 2e-3)


def test_double_precision_takes_plain_torch(launched: list[str], device: str) -> None:
    x, theta, condition = draw(device)
    level(device).double().decode(x.double(), theta.to(torch.float64), condition.double())
    assert launched == []
