"""What only a GPU can show: tensors past 2^31 numbers, models of full size, CUDA graphs. `make gpu-test` runs these.

The tests of `interpreted/` run there too, on CUDA tensors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from torch import Tensor

from hflow_rt.errors import BackendUnavailable
from hflow_rt.kernels import dispatch, proof
from hflow_rt.kernels.blur import blur_down, blur_up
from hflow_rt.kernels.coupling import Region, coupling
from hflow_rt.kernels.instance_norm import instance_norm_act
from hflow_rt.kernels.mixing import mixing
from hflow_rt.kernels.proof_cases import PROOFS, largest_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not dispatch.INSTALLED or dispatch.INTERPRETED,
        reason="needs a CUDA device and triton, not interpreted",
    ),
]


def smooth_images(count: int, side: int) -> Tensor:
    """In 0..255, on the CPU."""
    corners = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(255 * corners, size=side, mode="bilinear")


@pytest.fixture(scope="module", params=["hflow-128", "glow-64"])
def trained_model(request: pytest.FixtureRequest) -> Any:
    """Seeded, its heads small and its actnorms fitted to smooth images."""
    from hflow_rt.models.checkpoint import build_model
    from hflow_rt.models.registry import family

    torch.manual_seed(0)
    name = request.param.partition("-")[0]
    model: Any = build_model(name, family(name).presets[request.param]["model"])
    for parameter in model.parameters():
        if parameter.detach().abs().max() == 0:
            parameter.data = 1e-3 * torch.randn(parameter.shape)
    pixels = smooth_images(8, model.resolution).to(torch.uint8)
    model.initialize(pixels, torch.Generator().manual_seed(0))
    return model.eval().cuda()


@pytest.fixture(scope="module")
def large_model(trained_model: Any) -> Any:
    return trained_model.folded()


def latents_for(model: Any, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.7 * torch.randn(batch, *shape, generator=generator).cuda()
        for name, shape in model.latent_shapes().items()
    }


WEIGHT = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])


def coupled(x: Tensor) -> Tensor:
    """With a map of its two channels, of which one moves by all that the other holds, and the state as its own net."""
    weight = WEIGHT.to(x.device)
    return coupling(x, x, x, weight, weight[0], Region(1, 2), inverse=True, form="sigmoid")[0]


def mixed(x: Tensor) -> Tensor:
    return mixing(x, WEIGHT.to(x.device), WEIGHT[0].to(x.device))


@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_kernels_prove_themselves(operator: str) -> None:
    worst = largest_difference(PROOFS[operator], torch.device("cuda", 0))
    assert worst.share <= 1, worst


@pytest.fixture
def never_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if no kernel had ever run on this GPU."""
    monkeypatch.setattr(dispatch, "_proved", set())
    monkeypatch.setattr(proof, "_records", {})
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *name, **options: str(tmp_path))


@pytest.mark.usefixtures("never_met")
def test_a_graph_is_captured_only_of_what_was_proved() -> None:
    x = torch.randn(1, 2, 4, 4, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), dispatch.using("triton"), torch.cuda.stream(stream):
        with (
            pytest.raises(BackendUnavailable, match="kernel 'blur_up' is not yet proved on this GPU"),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
        ):
            blur_up(x + 1)
        expected = blur_up(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = blur_up(x)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


class FirstInGradient(torch.autograd.Function):
    """Meets its first kernel on the thread that runs the device's gradients, which a proof must not wait for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        return blur_up(blur_down(above[0]))


@pytest.mark.usefixtures("never_met")
def test_a_first_kernel_in_a_gradient() -> None:
    x = torch.ones(1, 2, 4, 4, device="cuda", requires_grad=True)
    with dispatch.using("triton"):
        (gradient,) = torch.autograd.grad(FirstInGradient.apply(x).sum(), x)
    assert torch.allclose(gradient, torch.ones_like(x))


@pytest.mark.parametrize("f", [coupled, mixed])
def test_states_past_2_31_numbers(f: Callable[[Tensor], Tensor]) -> None:
    images = 2**31 // (2 * 256**2) + 3
    if torch.cuda.mem_get_info()[0] < 3 * 4 * 2**31:
        pytest.skip("needs more memory than is free")
    x = torch.zeros(images, 2, 256, 256, device="cuda")
    x[-1].normal_(generator=torch.Generator("cuda").manual_seed(0))
    with dispatch.using("triton"), torch.no_grad():
        assert torch.equal(f(x)[-1], f(x[-1:])[0])


@pytest.mark.parametrize("f", [blur_down, blur_up, instance_norm_act])
def test_tensors_past_2_31_numbers(f: Callable[[Tensor], Tensor]) -> None:
    side = 128 if f is blur_up else 256
    images = 2**31 // side**2 + 3
    result = 4 if f is blur_up else 1
    if torch.cuda.mem_get_info()[0] < 2 * (1 + result) * 2**32:
        pytest.skip("needs more memory than is free")
    x = torch.zeros(images, 1, side, side, dtype=torch.bfloat16, device="cuda")
    x[-1].normal_(generator=torch.Generator("cuda").manual_seed(0))
    with dispatch.using("triton"), torch.no_grad():
        assert torch.equal(f(x)[-1], f(x[-1:])[0])


@pytest.mark.parametrize("batch", [1, 5])
def test_a_model_of_full_size(large_model: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    latents = latents_for(large_model, batch)
    with torch.no_grad(), dispatch.using("triton"):
        image = large_model.decode(latents)
        assert torch.equal(image, large_model.decode(latents))
        found = large_model.encode(image)
    with torch.no_grad(), dispatch.using("reference"):
        expected = large_model.decode(latents)
        encoding = large_model.encode(image)
    assert expected.std() > 0.01
    assert (image - expected).abs().max() < 1e-3
    for name, value in encoding.latents.items():
        assert (found.latents[name] - value).abs().max() < 1e-2 * max(1.0, float(value.abs().max()))
    assert (found.log_prob - encoding.log_prob).abs().max() < 1e-4 * encoding.log_prob.abs().max()


def test_a_training_step_of_full_size(trained_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = smooth_images(2, trained_model.resolution).cuda() / 256 - 0.5
    generator = torch.Generator().manual_seed(3)
    noise = {
        name: torch.randn(2, *shape, generator=generator).cuda() for name, shape in trained_model.noise_shapes().items()
    }

    def step(choice: str) -> tuple[Tensor, list[Tensor]]:
        trained_model.zero_grad()
        with dispatch.using(choice):
            loss = trained_model.loss(x, noise).loss
            loss.backward()
        return loss.detach(), [p.grad for p in trained_model.parameters() if p.grad is not None]

    found, mine = step("triton")
    expected, plain = step("reference")
    trained_model.zero_grad()
    assert abs(found - expected) <= 1e-4 * expected.abs()
    size = torch.stack([g.norm() for g in plain]).norm()
    off = torch.stack([(a - b).norm() for a, b in zip(mine, plain, strict=True)]).norm()
    assert 0 < size < torch.inf
    assert off <= 3e-2 * size


def test_a_cuda_graph_decodes_the_same(large_model: Any) -> None:
    latents = latents_for(large_model, 1)
    stream = torch.cuda.Stream()
    with torch.no_grad(), dispatch.using("triton"), torch.cuda.stream(stream):
        expected = large_model.decode(latents)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            image = large_model.decode(latents)
        for value in latents.values():
            value.mul_(0.5)
        graph.replay()
        halved = large_model.decode(latents)
    torch.cuda.synchronize()
    assert (image - halved).abs().max() < 1e-3
    assert (expected - halved).abs().max() > 1e-2
