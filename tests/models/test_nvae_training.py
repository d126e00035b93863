"""How NVAE trains: batch norm over processes, recomputed activations, what to try where it diverges."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hflow_rt.models.nvae.batch_norm import BatchNorm, standing_still
from hflow_rt.models.nvae.cells import DownSkip
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.model import NVAE
from hflow_rt.models.nvae.plan import NVAEPlan
from hflow_rt.models.nvae.presets import TINY
from hflow_rt.models.plan import Batch, Place, draw
from hflow_rt.training.footprint import saved_bytes


def plan(**changes: Any) -> NVAEPlan:
    torch.manual_seed(0)
    made = NVAEPlan(NVAE(NVAEConfig(**TINY["model"] | changes))).train()
    made.start(torch.zeros(1), torch.Generator().manual_seed(1))
    return made


def batch(of: NVAEPlan) -> Batch:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (4, *of.model.config.image_shape), generator=generator, dtype=torch.uint8)
    return Batch(pixels, draw(of.draws("network"), 4, generator), {})


def step(of: NVAEPlan) -> dict[str, Tensor]:
    """Gradients, and running statistics after them."""
    of.loss("network", batch(of), Place(3, 100, 200)).loss.backward()
    gradients = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
    return gradients | dict(of.named_buffers())


def test_recomputed_activations_change_nothing_but_memory() -> None:
    kept, again = plan(), plan(recompute=True)
    expected, found = step(kept), step(again)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert found["model.before.0.body.0.norm.num_batches_tracked"] == 1
    pixels = batch(kept).pixels
    whole, less = (saved_bytes(one, pixels, [""] * 4) for one in (kept, again))
    assert less < 0.6 * whole


def test_a_down_skip_stays_within_its_memory() -> None:
    """Channels last, as runs on a CPU lie: once its gradient ended the process."""
    torch.manual_seed(0)
    skip = DownSkip(12)
    x = torch.randn(16, 12, 64, 64)
    found = []
    for memory in (torch.contiguous_format, torch.channels_last):
        mine = x.clone(memory_format=memory).requires_grad_()
        out = skip(mine)
        (gradient,) = torch.autograd.grad(out.square().sum(), mine)
        found.append((out.detach(), gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_statistics_stand_still_where_they_are_told_to() -> None:
    norm, x = BatchNorm(3), torch.randn(2, 3, 4, 4)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with standing_still(norm):
        inside = norm(x)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert torch.equal(norm(x), inside)
    assert norm.num_batches_tracked == 1


@pytest.mark.slow
def test_two_processes_share_statistics(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = BatchNorm(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    x, weights = (torch.randn(6, 3, 4, 4, generator=generator) for _ in range(2))
    x = 2 + 3 * x
    save_file({"x": x, "weights": weights, **norm.state_dict()}, tmp_path / "given.safetensors")
    command = [sys.executable, str(Path(__file__).with_name("half_of_a_batch.py"))]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(120) for process in processes] == [0, 0]
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    whole = nn.BatchNorm2d(3, eps=1e-5, momentum=0.05)
    whole.load_state_dict(norm.state_dict())
    x.requires_grad_()
    out = whole(x)
    (weights * out.square()).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([one["out"], other["out"]]), out.detach())
    # each process has the gradient of the mean of both losses, times two, which trainers average away
    torch.testing.assert_close(torch.cat([one["x"], other["x"]]), x.grad, rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        gradient = whole.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(one[f"{name}.grad"] + other[f"{name}.grad"], gradient, rtol=1e-4, atol=1e-4)
    for name in ("running_mean", "running_var"):
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], whole.get_buffer(name))


def test_remedies_are_those_of_the_authors() -> None:
    assert plan().remedies() == (
        "a higher model.weight_penalty (now 0.01)",
        "one that starts high (model.weight_penalty_start=1)",
    )
    assert plan(weight_penalty_start=1.0).remedies()[1] == "a higher model.weight_penalty_start (now 1)"
