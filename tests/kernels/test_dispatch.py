"""The switch between kernels and plain torch, what it says, and that machines without Triton or a GPU never need it."""

import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor, nn

from hflow_rt.errors import BackendUnavailable, ConfigError
from hflow_rt.kernels import blur, coupling, dispatch, instance_norm, mixing
from hflow_rt.kernels.blur import blur_down, blur_down_moments, blur_up, blur_up_moments
from hflow_rt.kernels.coupling import Region
from hflow_rt.kernels.instance_norm import instance_norm_act, instance_norm_act_reference
from hflow_rt.kernels.moments import moments_reference

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
W = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1))


def test_cpu_tensors_take_plain_torch() -> None:
    assert not dispatch.takes(X)
    assert torch.equal(blur_down(X), blur.blur_down_reference(X))
    assert torch.equal(blur_up(X), blur.blur_up_reference(X))
    assert torch.equal(
        instance_norm_act(X, residual=X, leaky=True), instance_norm_act_reference(X, None, None, X, True)
    )
    assert torch.equal(mixing.mixing(X, W), mixing.mixing_reference(X, W))
    step = (X, X, X, W, None, Region(1, 3))
    for mine, plain in zip(
        coupling.coupling(*step, inverse=True, form="sigmoid"),
        coupling.coupling_reference(*step, inverse=True, form="sigmoid"),
        strict=True,
    ):
        assert torch.equal(mine, plain)


@NO_GPU
def test_asking_for_triton_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_asked", "triton")
    with pytest.raises(BackendUnavailable, match=r"HFLOW_RT_KERNELS=triton needs .*; set HFLOW_RT_KERNELS=auto"):
        blur_down(X)
    assert dispatch.live().startswith("BROKEN: HFLOW_RT_KERNELS=triton needs ")


def test_a_word_that_is_no_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_asked", "fast")
    for ask in (dispatch.live, lambda: blur_up(X)):
        with pytest.raises(ConfigError, match="must be one of reference, auto, triton; found 'fast'"):
            ask()


@NO_GPU
def test_a_choice_holds_inside_and_no_longer() -> None:
    before = dispatch.live()
    with pytest.raises(BackendUnavailable), dispatch.using("triton"):
        blur_down(X)
    with dispatch.using("auto"), dispatch.using("reference"):
        assert dispatch.live() == "off, plain torch runs: HFLOW_RT_KERNELS is 'reference'"
    assert dispatch.live() == before


@NO_GPU
def test_what_is_live_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.live().startswith("off, plain torch runs: ")
    monkeypatch.setattr(dispatch, "_asked", "reference")
    assert dispatch.live() == "off, plain torch runs: HFLOW_RT_KERNELS is 'reference'"
    monkeypatch.setattr(dispatch, "_asked", "auto")
    assert dispatch.live() == "off, plain torch runs: needs a CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "INSTALLED", False)
    assert dispatch.live() == "off, plain torch runs: needs triton: pip install 'hflow-rt[kernels]'"


@NO_GPU
def test_a_triton_that_cannot_launch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install 'hflow-rt[kernels]' on Linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_probed", False)
    monkeypatch.setattr(dispatch, "_failure", None)
    with dispatch.using("auto"):
        assert dispatch.live().startswith("off, plain torch runs: needs a triton that can launch, with a C compiler")
    with dispatch.using("triton"), pytest.raises(BackendUnavailable, match="needs a triton that can launch"):
        blur_down(X)


def test_forward_mode_takes_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "missing", lambda: None)
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with dispatch.using("triton"):
        assert dispatch.takes(X)
        with torch.autograd.forward_ad.dual_level():
            assert not dispatch.takes(X)


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from hflow_rt.kernels.blur import blur_up, _up
from hflow_rt.kernels.instance_norm import instance_norm, _norm
x = torch.randn(1, 2, 4, 4, requires_grad=True)
instance_norm(blur_up(x)).sum().backward()
_norm(_up(x, False)[0], None, None, None, None, False)[0].sum().backward()
from hflow_rt.kernels.coupling import _coupling
from hflow_rt.kernels.mixing import _mixing
y = _mixing(x, torch.eye(2), None, None, None, False)
_coupling(y, y, y, torch.eye(2), None, None, None, None, [0, 2, 1, 1, 0], False, "clipped")[0].sum().backward()
from hflow_rt.kernels.dispatch import live
print(live())
"""


def test_a_machine_without_triton_loses_nothing() -> None:
    run = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    missing = "needs triton: pip install 'hflow-rt[kernels]'" if torch.cuda.is_available() else "needs a CUDA device"
    assert run.stdout == f"off, plain torch runs: {missing}\n"


def test_moments_in_plain_torch() -> None:
    for f, plain in ((blur_down_moments, blur_down), (blur_up_moments, blur_up)):
        y, moments = f(X)
        assert torch.equal(y, plain(X))
        assert torch.equal(moments, moments_reference(y))
        assert torch.allclose(instance_norm_act(y, moments=moments), instance_norm.instance_norm(y), atol=1e-6)


def test_operators_on_the_cpu_keep_their_promises() -> None:
    x = X.double().requires_grad_()
    style = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for emit in (False, True):
        torch.library.opcheck(blur._down, (x, emit))
        torch.library.opcheck(blur._up, (x, emit))
    torch.library.opcheck(blur._down_adjoint, (x, 9, 12))
    torch.library.opcheck(blur._up_adjoint, (x,))
    torch.library.opcheck(instance_norm._norm, (x, style, style, x, None, True))
    known = moments_reference(x.detach())
    x, style = x.detach(), style.detach()
    torch.library.opcheck(instance_norm._norm, (x, None, None, None, known, False))
    torch.library.opcheck(instance_norm._norm_backward, (x, x, style, style, known, True, True))


def test_gradients_of_the_operators() -> None:
    x = X.double().requires_grad_()
    scale, shift = (torch.randn(2, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    for height in (4, 5):
        taller = torch.randn(1, 2, height, 3, dtype=torch.float64, requires_grad=True)
        for operator in (blur._down, blur._up):
            assert torch.autograd.gradcheck(lambda x, f=operator: f(x, False)[0], taller)
    for leaky in (False, True):
        assert torch.autograd.gradcheck(lambda *a, k=leaky: instance_norm._norm(*a, None, k)[0], (x, scale, shift, x))


class OnOperators(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y, moments = blur._up(x, True)
        x = blur._down(instance_norm._norm(y, None, None, None, moments, True)[0], False)[0]
        u = mixing._mixing(x, W, None, None, None, False)
        y, log_det = coupling._coupling(u, u, u, W, None, None, None, None, [1, 3, 0, 0, 0], True, "clipped")
        result: Tensor = y * log_det[:, None, None, None]
        return result


def plain(x: Tensor) -> Tensor:
    u = mixing.mixing(blur_down(instance_norm_act(blur_up(x), leaky=True)), W)
    y, log_det = coupling.coupling(u, u, u, W, None, Region(1, 3), inverse=True, form="clipped")
    return y * log_det[:, None, None, None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
def test_compiled_code_with_the_operators_runs_on_a_cpu() -> None:
    x = X.clone().requires_grad_()
    y = torch.compile(OnOperators(), fullgraph=True)(x)
    (grad,) = torch.autograd.grad(y.sin().sum(), x)
    expected = plain(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=2e-5)
    assert torch.allclose(grad, torch.autograd.grad(expected.sin().sum(), x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
def test_onnx_graphs_hold_plain_operators() -> None:
    class Public(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = mixing.mixing(instance_norm_act(blur_up(blur_down(x)), leaky=True), W)
            y, _ = coupling.coupling(x, x, x, W, None, Region(1, 3), inverse=False, form="sigmoid")
            return y

    program = torch.onnx.export(Public().eval(), (X,), dynamo=True, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}


def test_the_switch_costs_a_cpu_call_nothing() -> None:
    """Less than a microsecond, where the smallest blur takes twenty."""
    best = min(_seconds(1000) for _ in range(20)) / 1000
    assert best < 1e-6


def _seconds(calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        dispatch.takes(X)
    return time.perf_counter() - start
