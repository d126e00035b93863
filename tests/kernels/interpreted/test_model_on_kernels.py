"""A whole model on the kernels: a training step, a decode, compiled code, and graphs that stay free of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hflow_rt.kernels import blur, dispatch, moments
from hflow_rt.kernels import instance_norm as instance_norm_file
from hflow_rt.kernels.blur import blur_down, blur_up
from hflow_rt.kernels.instance_norm import instance_norm, instance_norm_act


@contextmanager
def plain_torch() -> Iterator[None]:
    asked = dispatch._asked
    dispatch._asked = "reference"
    try:
        yield
    finally:
        dispatch._asked = asked


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels launched so far."""
    found: list[Any] = []

    def noted(kernel: Any, *rest: Any, **arguments: Any) -> None:
        found.append(kernel)
        dispatch.launch(kernel, *rest, **arguments)

    for module in (blur, instance_norm_file, moments):
        monkeypatch.setattr(module, "launch", noted)
    return found


def test_a_training_step_equals_that_of_plain_torch(tiny_model: nn.Module, launched: list[Any], device: str) -> None:
    model: Any = tiny_model.to(device)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device) - 0.5
    noise = {
        name: torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(device)
        for name, shape in model.noise_shapes().items()
    }

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model.loss(images, noise).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with plain_torch():
        expected, gradients = step()
    assert launched == []
    found, mine = step()
    model.zero_grad()
    assert len(launched) > 20
    assert len(mine) == len(gradients) > 100
    assert abs(found - expected) < 1e-5
    for a, b in zip(mine, gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


def test_a_decode_equals_that_of_plain_torch(tiny_model: nn.Module, launched: list[Any], device: str) -> None:
    model: Any = tiny_model.to(device)
    latents = {
        name: 0.7 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(2)).to(device)
        for name, shape in model.latent_shapes().items()
    }
    with torch.no_grad():
        with plain_torch():
            expected = model.decode(latents)
        assert launched == []
        found = model.decode(latents)
    assert len(launched) > 5
    assert (found - expected).abs().max() < 1e-5


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
    with plain_torch():
        Chain()(x)
    assert launched == []
    Chain()(x)
    assert len(launched) == 4
