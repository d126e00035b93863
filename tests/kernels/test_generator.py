"""What a generator makes of its styles: formulas, and operators and their gradients on a CPU."""

import math

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import bias_act, modulated_weights, quantise, split_act


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size) + seed))


@pytest.mark.parametrize(("bias", "clamp"), [(True, 0.5), (False, None)])
def test_activation(bias: bool, clamp: float | None) -> None:
    """Three times differentiable."""
    inputs = (draw(2, 3, 2, 2).requires_grad_(), draw(3).requires_grad_() if bias else None, 0.2, 1.5, clamp)
    torch.library.opcheck(bias_act._act, inputs)
    whole = inputs[0] if inputs[1] is None else inputs[0] + inputs[1][:, None, None]
    expected = torch.where(whole > 0, 1.5 * whole, 0.3 * whole)
    expected = expected if clamp is None else expected.clamp(-clamp, clamp)
    torch.testing.assert_close(bias_act._act(*inputs), expected)
    leaves = [t for t in inputs[:2] if t is not None]
    assert torch.autograd.gradcheck(lambda *t: bias_act._act(*t, *inputs[len(t) :]).square(), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: bias_act._act(*t, *inputs[len(t) :]).square(), leaves)
    y = expected.detach()
    torch.library.opcheck(bias_act.backward, (draw(2, 3, 2, 2, seed=1).requires_grad_(), y, 0.2, 1.5, clamp, bias))


def test_weights_are_their_formula_row_by_row() -> None:
    style, weight, columns = draw(2, (3 + 4) * 2), draw(3, 4), draw(2, 4)
    found = modulated_weights.modulated_weights(style, weight, 2, 0.5, columns)
    for b in range(2):
        left, right = style[b, :6].view(3, 2), style[b, 6:].view(2, 4)
        for o in range(3):
            row = torch.stack([weight[o, i] * (1 + 0.5 * (left[o] * right[:, i]).sum()) for i in range(4)])
            torch.testing.assert_close(found[b, o], row / math.sqrt(row.square().sum()) * columns[b], atol=1e-7, rtol=0)


@pytest.mark.parametrize("columns", [False, True])
def test_operator_of_weights_and_its_gradients(columns: bool) -> None:
    factors = draw(2, 4).requires_grad_() if columns else None
    inputs = (draw(2, 14).requires_grad_(), draw(3, 4).requires_grad_(), factors, 2, 0.5)
    torch.library.opcheck(modulated_weights._generate, inputs)
    plain = modulated_weights.modulated_weights_reference(*inputs)
    torch.testing.assert_close(modulated_weights._generate(*inputs), plain)
    assert torch.autograd.gradcheck(lambda *t: modulated_weights._generate(*t, 2, 0.5), inputs[:3])
    assert torch.autograd.gradgradcheck(lambda *t: modulated_weights._generate(*t, 2, 0.5), inputs[:3])
    known = [t if not isinstance(t, Tensor) else t.detach() for t in inputs]
    torch.library.opcheck(modulated_weights._backward, (plain.detach(), *known))


@pytest.mark.parametrize("mode", split_act.MODES)
def test_a_layer_in_two_parts(mode: str) -> None:
    """Enlarging keeps the corners, or makes four of each pixel; twice differentiable."""
    inputs = (*(draw(1, 2, side, side).requires_grad_() for side in (6, 3)), draw(2).requires_grad_(), mode, 0.7)
    torch.library.opcheck(split_act._split, inputs)
    torch.library.opcheck(split_act._gathered, (draw(1, 2, 6, 6).requires_grad_(), 3, mode))
    assert torch.autograd.gradcheck(lambda *t: split_act._split(*t, mode, 0.7), inputs[:3])
    assert torch.autograd.gradgradcheck(lambda *t: split_act._split(*t, mode, 0.7), inputs[:3])
    large, low = split_act.enlarged(inputs[1], mode).detach(), inputs[1].detach()
    torch.testing.assert_close(large[..., [0, -1], [0, -1]], low[..., [0, -1], [0, -1]])
    if mode == "nearest":
        torch.testing.assert_close(large, low.repeat_interleave(2, 2).repeat_interleave(2, 3))
    else:
        torch.testing.assert_close(large[..., 2, 0], low[..., 0, 0] + 0.8 * (low[..., 1, 0] - low[..., 0, 0]))


def test_bytes() -> None:
    images = torch.tensor([[-1.0, 0.0, 0.5 / 255, 1.5 / 255, 0.2, 1.0, 2.0, 254.6 / 255]]).view(1, 2, 2, 2)
    torch.library.opcheck(quantise._quantise, (images,))
    assert quantise.quantise(images).tolist() == [[[[0, 51], [0, 255]], [[0, 255], [2, 255]]]]
