"""Equalised layers: the effective weight, what lr_scale does and does not do, and the folded form."""

import math

import numpy as np
import pytest
import torch

from hflow_rt.layers.equalized import EqualizedConv2d, EqualizedLinear, activate

GAINS = {"linear": 1.0, "leaky": math.sqrt(2 / 1.01), "tanh": 5 / 3}


def act(x: np.ndarray, activation: str) -> np.ndarray:
    return {"linear": x, "leaky": np.where(x > 0, x, 0.1 * x), "tanh": np.tanh(x)}[activation]


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Zero-padded correlation, one output at a time."""
    pad = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    y = np.empty((len(x), len(weight), *x.shape[2:]))
    for b, c, i, j in np.ndindex(*y.shape):
        window = padded[b, :, i : i + weight.shape[2], j : j + weight.shape[3]]
        y[b, c, i, j] = (window * weight[c]).sum() + bias[c]
    return y


@pytest.mark.parametrize("activation", ["linear", "leaky", "tanh"])
@pytest.mark.parametrize(("c_in", "c_out", "kernel"), [(1, 1, 1), (3, 4, 3), (5, 2, 5)])
def test_convolution_is_its_formula(c_in: int, c_out: int, kernel: int, activation: str) -> None:
    torch.manual_seed(kernel)
    layer = EqualizedConv2d(c_in, c_out, kernel, activation=activation, lr_scale=0.3).double()  # type: ignore[arg-type]
    layer.bias.data.normal_()
    x = torch.randn(2, c_in, 6, 5, dtype=torch.float64)
    weight = layer.weight.detach().numpy() * 0.3 * GAINS[activation] / math.sqrt(c_in * kernel**2)
    expected = act(convolve(x.numpy(), weight, layer.bias.detach().numpy() * 0.3), activation)
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(layer.fold()(x).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("activation", ["linear", "leaky", "tanh"])
@pytest.mark.parametrize(("c_in", "c_out"), [(1, 1), (7, 3)])
def test_linear_is_its_formula(c_in: int, c_out: int, activation: str) -> None:
    torch.manual_seed(c_in)
    layer = EqualizedLinear(c_in, c_out, activation=activation, lr_scale=0.2).double()  # type: ignore[arg-type]
    layer.bias.data.normal_()
    x = torch.randn(4, c_in, dtype=torch.float64)
    gain = 1.0 if activation == "linear" else GAINS["leaky"]  # tanh too
    weight = layer.weight.detach().numpy() * 0.2 * gain / math.sqrt(c_in)
    expected = act(x.numpy() @ weight.T + 0.2 * layer.bias.detach().numpy(), activation)
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(layer.fold()(x).numpy(), expected, atol=1e-12)


def make(kind: str, lr_scale: float) -> EqualizedConv2d | EqualizedLinear:
    torch.manual_seed(0)
    return EqualizedConv2d(3, 4, 3, lr_scale=lr_scale) if kind == "conv" else EqualizedLinear(3, 4, lr_scale=lr_scale)


@pytest.mark.parametrize("lr_scale", [0.2, 10.0])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_lr_scale_leaves_the_initial_function_alone(kind: str, lr_scale: float) -> None:
    one, scaled = make(kind, 1.0), make(kind, lr_scale)
    for a, b in zip(one.effective(), scaled.effective(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lr_scale", [0.2, 10.0])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_lr_scale_multiplies_the_effective_step_of_adam(kind: str, lr_scale: float) -> None:
    def step(layer: EqualizedConv2d | EqualizedLinear) -> list[torch.Tensor]:
        layer.double()
        before = [values.detach().clone() for values in layer.effective()]
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, eps=0)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        layer(x if kind == "conv" else x[:, :, 0, 0]).pow(3).sum().backward()
        optimizer.step()
        return [after.detach() - then for after, then in zip(layer.effective(), before, strict=True)]

    for a, b in zip(step(make(kind, 1.0)), step(make(kind, lr_scale)), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, lr_scale * a, rtol=1e-6, atol=1e-12)


def test_zero_starts_at_zero_and_no_bias_means_none() -> None:
    layer = EqualizedConv2d(3, 2, 3, zero=True, bias=False)
    layer.bias.data.fill_(7.0)
    assert torch.equal(layer(torch.randn(1, 3, 4, 4)), torch.zeros(1, 2, 4, 4))
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}  # as in published files


def test_activate() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert activate(x, "linear").tolist() == [-2.0, 0.0, 3.0]
    assert activate(x, "leaky").tolist() == [pytest.approx(-0.2), 0.0, 3.0]
    torch.testing.assert_close(activate(x, "tanh"), torch.tanh(x))


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_gradients(kind: str) -> None:
    layer = make(kind, 0.5).double()
    shape = (2, 3, 3, 3) if kind == "conv" else (2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return found

    assert torch.autograd.gradcheck(call, (x, weight, bias))
