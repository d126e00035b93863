"""An hflow model on the kernels: a training step, decodes, compiled code, and graphs that stay free of kernels."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hflow_rt.kernels import dispatch
from hflow_rt.kernels.blur import blur_down, blur_up
from hflow_rt.kernels.instance_norm import instance_norm, instance_norm_act


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels launched so far."""
    found: list[Any] = []

    def noted(kernel: Any, *rest: Any, **arguments: Any) -> None:
        found.append(kernel)
        dispatch.launch(kernel, *rest, **arguments)

    modules = [module for name, module in sys.modules.items() if name.startswith("hflow_rt.kernels.")]
    for module in modules:
        if module is not dispatch and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", noted)
    return found


def names(launched: list[Any]) -> set[str]:
    return {kernel.fn.__name__ for kernel in launched}


def test_a_training_step_equals_that_of_plain_torch(tiny_model: Any, launched: list[Any], device: str) -> None:
    """A gradient is as near the one in float64 as plain torch's. What rounding puts on the other side of a leaky
    ReLU's kink moves either by a pixel's share, so the norm of what is off is looked at, and the typical error."""
    model: Any = tiny_model.to(device)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device) - 0.5
    noise = {
        name: torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)).to(device)
        for name, shape in model.noise_shapes().items()
    }

    def step(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        model.to(dtype).zero_grad()
        loss = model.loss(images.to(dtype), {name: value.to(dtype) for name, value in noise.items()}).loss
        loss.backward()
        return loss.detach(), [p.grad.double() for p in model.parameters() if p.grad is not None]

    found, mine = step(torch.float32)
    assert len(launched) > 50
    assert names(launched) >= {"_halve", "_double", "_normalise", "_gradient"}
    launched.clear()
    with dispatch.using("reference"):
        plain, plains = step(torch.float32)
        truth, right = step(torch.float64)
        model.float().zero_grad()
    assert launched == []
    assert abs(found - truth) <= 2 * abs(plain - truth) + 1e-6 * truth
    assert len(mine) == len(right) > 250
    size = torch.stack([g.norm() for g in right]).norm()
    errors = []
    for a, b, g in zip(mine, plains, right, strict=True):
        allowed = 2 * (b - g).norm() + 5e-3 * g.norm() + 1e-8 * size
        assert (a - g).norm() <= allowed
        if g.norm() > 1e-6 * size:
            errors.append([float((x - g).norm() / g.norm()) for x in (a, b)])
    assert len(errors) > 150
    typical = torch.tensor(errors).median(0).values
    assert typical[0] <= 2 * typical[1] + 1e-6


def test_a_decode_equals_that_of_plain_torch(tiny_model: Any, launched: list[Any], device: str) -> None:
    model: Any = tiny_model.to(device).folded()
    latents = {
        name: 0.7 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(2)).to(device)
        for name, shape in model.latent_shapes().items()
    }
    with torch.no_grad():
        found = model.decode(latents)
        assert len(launched) > 15
        assert names(launched) >= {"_halve", "_double", "_normalise"}
        launched.clear()
        with dispatch.using("reference"):
            expected = model.decode(latents)
            exact = model.double().decode({name: value.double() for name, value in latents.items()})
            model.float()
    assert launched == []
    assert expected.std() > 0.01
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6


class Chain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return instance_norm_act(blur_up(instance_norm(blur_down(x))), residual=x, leaky=True)


def test_compiled_code_calls_the_kernels(launched: list[Any], device: str) -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    compiled = torch.compile(Chain(), backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
    y = compiled(x)
    (grad,) = torch.autograd.grad(y.sin().sum(), x)
    assert len(launched) == 8
    expected = Chain()(x)
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.allclose(grad, torch.autograd.grad(expected.sin().sum(), x)[0], atol=1e-6)


def test_exported_graphs_hold_plain_operators(launched: list[Any], device: str) -> None:
    x = torch.randn(2, 3, 4, 6).to(device)
    assert dispatch.takes(x)
    program = torch.export.export(Chain(), (x,))
    assert launched == []
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in targets if "hflow_rt" in target]
    assert any("conv2d" in target for target in targets)


def test_types_without_kernels_take_plain_torch(launched: list[Any], device: str) -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, device=device)
    assert Chain()(x).dtype == torch.float64
    assert blur_down(x[:0]).shape == (0, 2, 2, 2)
    assert launched == []


def test_asking_for_plain_torch_gives_it(launched: list[Any], device: str) -> None:
    x = torch.randn(1, 2, 4, 4, device=device)
    with dispatch.using("reference"):
        Chain()(x)
    assert launched == []
    Chain()(x)
    assert len(launched) == 4
