"""A proof disturbs nothing of whoever calls a kernel first, and nothing of theirs disturbs it."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hflow_rt.errors import BackendUnavailable
from hflow_rt.kernels import dispatch, mixing, proof
from hflow_rt.kernels.blur import blur_down, blur_up
from hflow_rt.kernels.mixing import mixing_reference


def mix(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = mixing.mixing(x, weight)
    return y


@contextmanager
def in_default_device(name: str) -> Iterator[None]:
    with torch.device(name):
        yield


MODES: dict[str, Callable[[str], Any]] = {
    "no_grad": lambda device: torch.no_grad(),
    "inference mode": lambda device: torch.inference_mode(),
    "autocast": lambda device: torch.autocast(device, torch.bfloat16),
    "default device": lambda device: in_default_device("meta"),
    "anomaly mode": lambda device: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", list(MODES))
def test_the_modes_of_the_caller_stay_out(mode: str, on_new_gpu: Any, device: str, x: Tensor, weight: Tensor) -> None:
    def state() -> tuple[Any, ...]:
        flags = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device))
        return *flags, torch.get_default_device(), dispatch._asked, torch.random.get_rng_state().tolist()

    numbers = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    with MODES[mode](device):
        before = state()
        y = mix(x, weight)
        assert state() == before
    assert on_new_gpu.proofs == ["mixing"]
    assert torch.allclose(y, mixing_reference(x, weight), atol=1e-6)
    assert np.random.get_state()[1].tolist() == numbers  # type: ignore[union-attr]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("operator", ["blur_up", "instance_norm_act", "mixing"])
def test_settings_of_the_process_change_nothing(operator: str, on_new_gpu: Any, device: str) -> None:
    proof.prove(operator, torch.device(device))


class LateBlur(torch.autograd.Function):
    """Meets its first kernel in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        return blur_up(blur_down(above[0]))


def test_a_first_kernel_in_a_gradient(on_new_gpu: Any, device: str) -> None:
    """On the thread that runs the device's gradients, which a proof must not wait for."""
    x = torch.ones(1, 2, 4, 4, device=device, requires_grad=True)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(torch.autograd.grad, LateBlur.apply(x).sum(), x)
        (gradient,) = done.result(timeout=120)
    assert torch.allclose(gradient, torch.ones_like(x))
    assert on_new_gpu.proofs == ["blur_down", "blur_up"]


def test_many_threads_wait_for_one_proof(
    on_new_gpu: Any, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier, one_at_a_time = threading.Barrier(6), threading.Lock()  # as the interpreter needs it

    def launch(*rest: Any, **arguments: Any) -> None:
        with one_at_a_time:
            dispatch.launch(*rest, **arguments)

    monkeypatch.setattr(mixing, "launch", launch)

    def ask() -> Tensor:
        barrier.wait()
        return mix(x, weight)

    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(ask) for _ in range(6)]
    assert all(torch.equal(result.result(), results[0].result()) for result in results)
    assert on_new_gpu.proofs == ["mixing"]


def test_nothing_is_proved_while_a_graph_is_captured(
    remembering: Any, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (
        "kernel 'mixing' is not yet proved on this GPU, and cannot be while a CUDA graph is captured; run once before"
    )
    with monkeypatch.context() as capturing:
        capturing.setattr(proof, "_capturing", lambda device: True)
        with pytest.raises(BackendUnavailable, match=line):
            mix(x, weight)
    assert remembering.proofs == remembering.files() == []
    mix(x, weight)
    assert remembering.restarted().kept()
    monkeypatch.setattr(proof, "_capturing", lambda device: True)
    mix(x, weight)  # a process before proved it
    assert remembering.proofs == []


def test_compiled_code_is_proved_when_it_runs(
    on_new_gpu: Any, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, weight), mixing_reference(x, weight), atol=1e-6)
    assert on_new_gpu.proofs == ["mixing"]
    on_new_gpu.environment = dataclasses.replace(on_new_gpu.known, driver="another")
    on_new_gpu.restarted()
    on_new_gpu.harms(mixing, ("_mix", "y"), monkeypatch)
    with pytest.raises(BackendUnavailable, match="kernel 'mixing' computes wrong"):
        compiled(x, weight)


def test_plain_torch_needs_no_proof(remembering: Any, x: Tensor, weight: Tensor) -> None:
    with dispatch.using("reference"):
        mix(blur_up(x), weight)
    mix(x.double(), weight.double())
    assert remembering.proofs == []
