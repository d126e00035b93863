"""Glow on the kernels: a training step, both directions as trained and folded, and graphs that stay free of kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hflow_rt.kernels import coupling_kernels, dispatch, mixing
from hflow_rt.layers.fold import fold_children
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.folded import FOLDS
from hflow_rt.models.glow.network import Glow

# 12 channels, whose maps the kernels hold, and 24, whose they do not
BASE: dict[str, Any] = {"resolution": 8, "levels": 2, "steps": 2, "hidden_channels": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"lu": True},
    "repository": {"scale": "exp_sigmoid", "moving": "first", "edge": "ones", "hidden": "bias"},
    "additive": {"coupling": "additive", "permutation": "shuffle"},
}


@contextmanager
def plain_torch(launched: list[str]) -> Iterator[None]:
    launched.clear()
    with dispatch.using("reference"):
        yield
    assert launched == []


@pytest.fixture
def launched(launched_by: Callable[..., list[str]]) -> list[str]:
    """Names of the kernels launched so far."""
    return launched_by(coupling_kernels, mixing)


def make(device: str, **changes: Any) -> Glow:
    """Nothing left at zero, actnorms fitted."""
    torch.manual_seed(1)
    model = Glow(GlowConfig(**(BASE | changes))).to(device)
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data = 0.1 * torch.randn(parameter.shape).to(device)
    with dispatch.using("reference"):
        model.init_from_batch(images(16, device) - 0.5)
    return model.eval()


def images(count: int, device: str) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(device)


def draw(model: Glow, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.5 * torch.randn(2, *shape, generator=generator).to(device)
        for name, shape in model.latent_shapes().items()
    }


def near(found: list[Tensor], truth: list[Tensor], plain: list[Tensor]) -> None:
    """`found` is about as far from the float64 `truth` as plain torch in float32."""
    assert len(found) == len(truth)
    for mine, right, torchs in zip(found, truth, plain, strict=True):
        assert mine.shape == right.shape
        assert mine.dtype == torchs.dtype == torch.float32
        allowed = 4 * float((torchs - right).abs().max()) + 1e-5 * max(1.0, float(right.abs().max()))
        assert (mine - right).abs().max() <= allowed


@pytest.mark.parametrize(("variant", "folded"), [("repository", False), ("additive", True)])
def test_both_directions(variant: str, folded: bool, launched: list[str], device: str) -> None:
    model: Any = make(device, **VARIANTS[variant]).requires_grad_(False)
    wide = Glow(model.config).to(device).double()
    wide.load_state_dict(model.state_dict())
    if folded:
        model = model.folded()
        fold_children(wide, FOLDS)

    def run(model: Any, dtype: torch.dtype) -> list[Tensor]:
        latents = {name: z.to(dtype) for name, z in draw(model, device).items()}
        encoded = model.encode_model(images(2, device).to(dtype) - 0.5)
        log_dets = [chain.log_det for chain in encoded.chains]
        back = model.levels[0].chain(encoded.chains[0].value)
        decoded = model.decode_model(latents).image
        return [*encoded.latents, encoded.log_prob, *log_dets, back.value, back.log_det, decoded]

    with torch.no_grad():
        found = run(model, torch.float32)
        assert launched.count("_couple") == 4 + 2 + 4
        maps = launched.count("_mix")  # one a level goes in; others alone only where they are not folded
        assert maps == (1 if folded else 0 if variant == "additive" else 2 + 2 + 2)
        with plain_torch(launched):
            near(found, run(wide, torch.float64), run(model, torch.float32))


@pytest.mark.parametrize(("variant", "recomputed"), [("paper", True), ("repository", False)])
def test_a_training_step(variant: str, recomputed: bool, launched: list[str], device: str) -> None:
    model = make(device, **VARIANTS[variant], invertible_backward=recomputed).train()

    def step(model: Glow, dtype: torch.dtype) -> list[Tensor]:
        x = (images(2, device) - 0.5).to(dtype).requires_grad_()
        loss = model.loss(x).loss
        return [loss.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]

    found = step(model, torch.float32)
    assert launched.count("_couple_gradient") == 4
    assert launched.count("_couple") == (12 if recomputed else 4)
    with plain_torch(launched):
        plain = step(model, torch.float32)
        truth = step(model.double(), torch.float64)
    assert len(found) > 40
    near(found, truth, plain)


def test_nets_under_autocast_stay_half(launched: list[str], device: str) -> None:
    model = make(device, lu=True, levels=1).train()
    x = images(2, device) - 0.5

    def step() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(device, torch.bfloat16):
            encoded = model.encode_model(x)
        loss = -encoded.log_prob.mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return encoded.log_prob.detach(), list(gradients)

    found, mine = step()
    assert launched.count("_couple") == 6
    with plain_torch(launched):
        expected, plain = step()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()
    for gradient, other in zip(mine, plain, strict=True):
        assert gradient.dtype == other.dtype
        assert (gradient - other).norm() <= 3e-2 * other.norm() + 1e-4


def test_exported_graphs_hold_plain_operators(launched: list[str], device: str) -> None:
    class Both(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            encoded = self.model.encode_model(x)
            image: Tensor = self.model.decode_model({f"z{i}": z for i, z in enumerate(encoded.latents)}).image
            return image

    model = make(device, lu=True).folded()
    launched.clear()
    program = torch.export.export(Both(model).eval(), (images(2, device),))
    assert launched == []
    assert not [node for node in program.graph.nodes if "hflow_rt" in str(node.target)]


def test_double_precision_takes_plain_torch(launched: list[str], device: str) -> None:
    model = make(device, lu=True).double()
    model.loss(images(2, device).double()).loss.backward()
    assert launched == []
