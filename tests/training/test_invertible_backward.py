"""Gradients of a chain that recomputes its activations are those of plain autograd, and memory does not grow."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.flow import FlowChain
from hflow_rt.models.glow.network import Glow

SMALL: dict[str, Any] = {"resolution": 8, "levels": 2, "steps": 3, "hidden_channels": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "lu": {"lu": True, "edge": "ones", "hidden": "bias", "moving": "first", "scale": "exp_sigmoid"},
    "additive": {"coupling": "additive", "permutation": "shuffle"},
    "classes": {"classes": ("a", "b", "c"), "classifier": True},
}


def make(changes: dict[str, Any], invertible: bool) -> Glow:
    torch.manual_seed(0)
    model = Glow(GlowConfig(**SMALL, **changes, invertible_backward=invertible)).double()
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.init_from_batch(torch.rand(8, 3, 8, 8).double() - 0.5)
    return model.train()


def gradients(model: Glow, x: Tensor) -> tuple[float, dict[str, Tensor | None]]:
    labels = {"labels": torch.eye(3).double()[torch.arange(len(x)) % 3]} if model.config.classes else None
    loss = model.loss(x, None, labels).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_gradients_are_those_of_autograd(variant: str) -> None:
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double() - 0.5
    found = [gradients(make(VARIANTS[variant], invertible), x.clone().requires_grad_()) for invertible in (False, True)]
    (plain_loss, plain), (loss, recomputed) = found
    assert loss == plain_loss
    assert plain.keys() == recomputed.keys()
    largest = 0.0
    for name, expected in plain.items():
        actual = recomputed[name]
        assert expected is not None, name
        assert actual is not None, name
        assert (actual - expected).abs().max() <= 1e-11 * max(1.0, float(expected.abs().max())), name
        largest = max(largest, float(expected.abs().max()))
    assert largest > 0.01


def test_frozen_parameters_get_no_gradient() -> None:
    model = make({}, True)
    frozen = [model.levels[0].chain.steps[1].coupling.net.conv2.weight, model.levels[1].chain.steps[0].actnorm.shift]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.loss(torch.rand(2, 3, 8, 8).double() - 0.5).loss.backward()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_autocast_is_the_same_on_the_way_back() -> None:
    """The subnets run in bfloat16 both times; the flow's state stays in float32."""
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5
    found = []
    for invertible in (False, True):
        model = make({}, invertible).float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(x).loss
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert found[0][0] == found[1][0]
    error = (found[1][1] - found[0][1]).norm() / found[0][1].norm()
    assert error < 0.02  # a bfloat16 subnet rounds at 0.004, and rounds differently at inputs that differ by 1e-7


class Saved:
    """Bytes that autograd keeps for backward."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


@pytest.mark.parametrize("invertible", [False, True])
def test_what_is_kept_for_backward(invertible: bool) -> None:
    """With recomputation it is the chain's output, whatever the number of steps."""

    def kept(steps: int) -> int:
        torch.manual_seed(0)
        config = GlowConfig(**{**SMALL, "steps": steps}, permutation="reverse", invertible_backward=invertible)
        chain, saved = FlowChain(config, 0), Saved()
        x = torch.randn(64, 12, 4, 4, requires_grad=True)
        own = {p.untyped_storage().data_ptr() for p in [*chain.parameters(), *chain.buffers()]}
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            result = chain.inverse(x)
        size = sum(size for place, size in saved.storages.items() if place not in own)
        result.value.sum().backward()
        return size

    few, many = kept(2), kept(8)
    if invertible:
        # one tensor of the size of x; the rest are numbers for the constant log-determinants
        assert many < 1.2 * 64 * 12 * 16 * 4
        assert many < 1.1 * few
    else:
        assert many > 3 * few
