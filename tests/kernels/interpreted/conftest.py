"""Tests of the Triton kernels themselves: on a CUDA device, or by Triton's interpreter on the CPU.

The interpreter must be chosen before triton is imported, so `tests/kernels/test_under_interpreter.py` runs this folder
in processes of its own; anywhere else it is skipped over unless there is a GPU.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import dispatch

ON_GPU = dispatch.INSTALLED and not dispatch.INTERPRETED and torch.cuda.is_available()
collect_ignore_glob = [] if ON_GPU or dispatch.INTERPRETED else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_GPU and Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def _on_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions around them are float32 in earnest."""
    if ON_GPU:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with dispatch.using("triton"):
        yield


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write is NaN."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made: Tensor = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


LAYOUTS = ("packed", "half", "channels_last", "transposed")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, where something else lies between them, inside NaN."""
    b, c, h, w = x.shape
    if layout == "packed":
        return x.clone()
    if layout == "half":  # as after chunk(2, 1), with room beside and below
        around = torch.full((b, 2 * c, h + 1, w + 3), torch.nan, dtype=x.dtype, device=x.device)
        inside = around[:, c:, :h, 2 : 2 + w]
    elif layout == "channels_last":
        inside = torch.full((b, h, w, c + 1), torch.nan, dtype=x.dtype, device=x.device)[..., :c].permute(0, 3, 1, 2)
    else:
        inside = torch.full((b, c, w, h), torch.nan, dtype=x.dtype, device=x.device).transpose(2, 3)
    return inside.copy_(x)


@pytest.fixture(params=LAYOUTS)
def laid_out(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return lambda x: lay_out(x, request.param)


@pytest.fixture(scope="session")
def as_good() -> Callable[..., None]:
    """Check that `found` is at most twice as far from the float64 `truth` as plain torch in its type, plus `ulps`."""

    def check(found: Tensor, truth: Tensor, plain: Tensor, ulps: float = 1) -> None:
        assert found.shape == truth.shape
        assert truth.dtype == torch.float64
        assert found.isfinite().all()
        allowed = 2 * (plain - truth).abs().max() + ulps * torch.finfo(found.dtype).eps * truth.abs().max()
        assert (found - truth).abs().max() <= allowed

    return check
