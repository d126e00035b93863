"""Tests of the Triton kernels themselves: on a CUDA device, or by Triton's interpreter on the CPU.

The interpreter must be chosen before triton is imported, so `tests/kernels/test_under_interpreter.py` runs this folder
in processes of its own; anywhere else it is skipped over unless there is a GPU.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs
import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import dispatch, proof
from hflow_rt.kernels.proof_cases import PROOFS, Difference, largest_difference
from hflow_rt.kernels.proof_records import Environment

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
    """Convolutions around them are float32 in earnest. No proof comes first: its launches would count as a test's."""
    monkeypatch.setattr(dispatch, "_proves", False)
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


@pytest.fixture(scope="session", autouse=True)
def _patched_once() -> Iterator[None]:
    """Triton's interpreter patches its language for every call of a helper too, a third of its time: once will do.

    Another third goes into each sum and product of whole numbers again in int64, to see whether it overflows, which
    sizes of tests cannot; a tenth into the table of numpy's types that it makes anew for every array.
    """
    if not dispatch.INTERPRETED:
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def unless_patched(function: Any) -> Any:
        seen = [lang for lang in (language, language.core) if lang in function.__globals__.values()]
        fresh = any(language.core.is_builtin(lang.load) for lang in seen)
        return patch(function) if fresh else interpreter._LangPatchScope()

    table, known = interpreter._get_np_dtype, dict[str, Any]()

    def looked_up(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = table(dtype)
        return known[dtype.name]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", unless_patched)
        patched.setattr(interpreter, "_get_np_dtype", looked_up)
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        patched.setattr(interpreter.interpreter_builder, "options", options)
        yield


@pytest.fixture
def launched_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`launched_by(MODULE, ...)` is a list of the names of the kernels that these launch from then on."""

    def listed(*modules: ModuleType) -> list[str]:
        found: list[str] = []

        def noted(kernel: Any, *rest: Any, **arguments: Any) -> None:
            found.append(kernel.fn.__name__)
            dispatch.launch(kernel, *rest, **arguments)

        for module in modules:
            monkeypatch.setattr(module, "launch", noted)
        return found

    return listed


LAYOUTS = ("half", "channels_last", "transposed")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, where something else lies between them, inside NaN."""
    b, c, h, w = x.shape
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


class NewGpu:
    """What the tests change of a GPU, and the proofs that ran on it."""

    known = Environment("A GPU", "9.0", "580.1", "2.13.0", "13.0", "3.9.0", "0123456789abcdef")

    def __init__(self, cache: Path) -> None:
        self.environment, self.cache = self.known, cache
        self.proofs: list[str] = []
        self.quick = False  # whether proofs pass without being made

    def restarted(self) -> "NewGpu":
        """As the next process finds it."""
        dispatch._proved.clear()
        proof._records.clear()
        self.proofs.clear()
        return self

    def files(self) -> list[Path]:
        return sorted(self.cache.rglob("*.json"))

    def kept(self) -> list[Any]:
        return [json.loads(path.read_text()) for path in self.files()]

    @staticmethod
    def harms(module: ModuleType, harm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Launches of `module` do harm to what they have written.

        harm: called with a kernel's name and arguments; or a kernel, an argument and for the blurs whether in the
        gradient, whose values are then off by one in ten thousand.
        """

        def off(launched: str, arguments: dict[str, Any]) -> None:
            kernel, argument, adjoint = (*harm, False)[:3]
            if (launched, arguments.get("ADJOINT", False)) == (kernel, adjoint) and arguments[argument] is not None:
                arguments[argument].mul_(1.0001)

        def launch(kernel: Any, *rest: Any, **arguments: Any) -> None:
            dispatch.launch(kernel, *rest, **arguments)
            (harm if callable(harm) else off)(kernel.fn.__name__, arguments)

        monkeypatch.setattr(module, "launch", launch)


@pytest.fixture
def on_new_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> NewGpu:
    """A GPU that no kernel has met, played by the interpreter, which proves nothing by itself."""
    gpu = NewGpu(tmp_path / "cache")
    monkeypatch.setattr(dispatch, "_proves", True)
    monkeypatch.setattr(dispatch, "_proved", set())
    monkeypatch.setattr(proof, "_records", {})
    monkeypatch.setattr(proof, "environment", lambda device: gpu.environment)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *name, **options: str(gpu.cache))

    def counted(which: Any, device: torch.device) -> Any:
        gpu.proofs.append(next(name for name in PROOFS if PROOFS[name] is which))
        return Difference("", 0.0, 1.0) if gpu.quick else largest_difference(which, device)

    monkeypatch.setattr(proof, "largest_difference", counted)
    return gpu


@pytest.fixture
def remembering(on_new_gpu: NewGpu) -> NewGpu:
    """Where what is remembered is tested, not what is proved."""
    on_new_gpu.quick = True
    return on_new_gpu


@pytest.fixture
def x(device: str) -> Tensor:
    return torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture
def weight(device: str) -> Tensor:
    return torch.tensor([[0.8, 0.6], [-0.6, 0.8]], device=device)
