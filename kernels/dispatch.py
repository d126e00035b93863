"""Which implementation runs, Triton's kernels or plain torch, and the one way a kernel is launched.

`HFLOW_RT_KERNELS` is the switch, read when this module is imported:

auto        Triton for CUDA tensors where Triton is installed, plain torch for everything else: the default
reference   plain torch everywhere
triton      Triton for CUDA tensors, and `BackendUnavailable` on a machine that cannot run it

Under `TRITON_INTERPRET=1`, `triton` also takes CPU tensors, through Triton's interpreter: slow, for tests.
`using` chooses for a stretch of a program instead, which is how the two are compared in one process.
`HFLOW_RT_KERNELS_OFF=coupling,mixing` runs plain torch in place of these operators of `OPERATORS` alone.

An operator that meets a GPU for the first time is proved there before it runs: see `proof`.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hflow_rt.errors import BackendUnavailable, ConfigError

__all__ = [
    "CHOICES",
    "INSTALLED",
    "INTERPRETED",
    "OFF_SWITCH",
    "OPERATORS",
    "SWITCH",
    "Launch",
    "jit",
    "launch",
    "live",
    "missing",
    "off",
    "operator",
    "recorded",
    "round_up",
    "takes",
    "tl",
    "triton",
    "using",
]


if TYPE_CHECKING:
    import triton
    from torch._library.custom_ops import CustomOpDef
    from triton import language as tl
else:
    try:
        import triton
        from triton import language as tl
    except ImportError:  # on most machines without a GPU
        triton = None
        tl = SimpleNamespace(constexpr=int)  # what the signatures of kernels name; nothing runs their bodies

SWITCH, OFF_SWITCH = "HFLOW_RT_KERNELS", "HFLOW_RT_KERNELS_OFF"
CHOICES = ("reference", "auto", "triton")
# each with its gradient
OPERATORS = (
    "batch_norm_silu",
    "bias_act",
    "blur_down",
    "blur_up",
    "coupling",
    "group_norm_silu",
    "instance_norm_act",
    "mixing",
    "mixture_image",
    "mixture_log_prob",
    "modulated_weights",
    "quantise",
    "residual_normal",
    "sampler_update",
    "split_act",
    "squeeze_excite",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTALLED = bool(triton)
INTERPRETED = INSTALLED and bool(triton.knobs.runtime.interpret)

_asked = os.environ.get(SWITCH) or "auto"
_off = frozenset(name.strip() for name in os.environ.get(OFF_SWITCH, "").split(",") if name.strip())
_unknown = sorted(_off.difference(OPERATORS))


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`; without Triton the function as it is, which nothing calls."""
    return triton.jit(function) if INSTALLED else function


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Inside, `choice` stands for what `HFLOW_RT_KERNELS` says, in all threads."""
    global _asked
    before, _asked = _asked, choice
    try:
        yield
    finally:
        _asked = before


def takes(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`. Raises `BackendUnavailable` where they were asked for and cannot run."""
    if _asked == "reference" or (_asked == "auto" and not x.is_cuda):  # what nearly every call takes comes first
        return False
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():  # graphs hold plain operators only
        return False
    if forward_ad._current_level >= 0:  # which the operators have no rule for
        return False
    lacking = missing()
    if lacking and _asked == "triton":
        raise BackendUnavailable(f"{SWITCH}=triton {lacking}; set {SWITCH}=auto, or unset it")
    return not lacking and (x.is_cuda or INTERPRETED) and x.dtype in DTYPES and x.numel() > 0


def live() -> str:
    """What runs, in words, for `hflow-rt doctor`."""
    lacking = missing()
    if lacking is None:
        where = "the interpreter" if INTERPRETED else torch.cuda.get_device_name()
        but = f"; plain torch by {OFF_SWITCH}: {', '.join(sorted(_off))}" if _off else ""
        return f"live: triton {triton.__version__} on {where}{but}"
    if _asked == "triton":
        return f"BROKEN: {SWITCH}=triton {lacking}"
    return f"off, plain torch runs: {lacking}"


def missing() -> str | None:
    """What keeps the kernels from running here, if anything. Raises `ConfigError` for settings that are none."""
    if _asked not in CHOICES:
        raise ConfigError(f"{SWITCH} must be one of {', '.join(CHOICES)}; found {_asked!r}; unset it for auto")
    if _unknown:
        raise ConfigError(f"{OFF_SWITCH} must list some of {', '.join(OPERATORS)}; found {_unknown[0]!r}; unset it")
    if _asked == "reference":
        return f"{SWITCH} is 'reference'"
    if not torch.cuda.is_available() and not (INTERPRETED and _asked == "triton"):
        return "needs a CUDA device"
    if not INSTALLED:
        return "needs triton: pip install 'hflow-rt[kernels]'"
    if _asked == "auto" and torch.version.hip:
        return "was not tried on ROCm"
    return None if INTERPRETED else _launch_failure()


_probed: bool = False
_failure: str | None = None


def _launch_failure() -> str | None:
    """What Triton says where it cannot build its launcher; asked once, and never while torch.compile looks on."""
    global _probed, _failure
    if not _probed and not torch.compiler.is_compiling():
        _probed = True
        try:
            getattr(triton.runtime.driver.active, "utils", None)
        except Exception as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            _failure = f"needs a triton that can launch, with a C compiler and Python's headers ({why[0]})"
    return _failure


def off(operator: str) -> bool:
    """Whether `HFLOW_RT_KERNELS_OFF` names this one of `OPERATORS`."""
    return operator in _off


def operator(
    name: str, kernel: Callable[..., Any], reference: Callable[..., Any], *, gradient_of: str | None = None
) -> "CustomOpDef":
    """The operator `hflow_rt::name`: `kernel` on CUDA tensors, `reference`, of the same signature, on CPU tensors.

    Where Triton interprets kernels, `kernel` runs on CPU tensors too, if it is asked for. `gradient_of`: the operator
    of `OPERATORS` that this is the gradient of, with which it is proved and switched off; by default it is one itself.
    """
    member = gradient_of or name
    fused = reference if off(member) else _proved_first(member, kernel)
    schema = torch.library.infer_schema(kernel, mutates_args=())
    made = torch.library.custom_op(f"hflow_rt::{name}", fused, mutates_args=(), device_types="cuda", schema=schema)
    on_cpu = (lambda *inputs: (fused if _asked == "triton" else reference)(*inputs)) if INTERPRETED else reference
    made.register_kernel("cpu")(on_cpu)
    return made


_proves = not INTERPRETED  # what the interpreter runs is tested, and takes seconds
_proved: set[tuple[str, int]] = set()  # which operator may run on which device, by number; `proof` adds to it


def _proved_first(operator: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which raises `BackendUnavailable` on a device where the proof of `operator` fails."""

    @functools.wraps(kernel)
    def run(*inputs: Any) -> Any:
        if _proves and (operator, inputs[0].get_device()) not in _proved:
            from hflow_rt.kernels.proof import prove

            prove(operator, inputs[0].device)
        return kernel(*inputs)

    return run


def round_up(n: int) -> int:
    """The next power of two, as the sides of Triton's tiles must be."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything that decides what is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    warps: int
    arguments: dict[str, Any]


_record: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are written down and not run, so that meta tensors tell what would be compiled."""
    global _record
    _record = []
    try:
        yield _record
    finally:
        _record = None


def launch(kernel: Any, grid: tuple[int, ...], warps: int, **arguments: Any) -> None:
    """Run `kernel` on the device of its first tensor. Grids are `(x, y, z)` with y and z at most 65535."""
    if _record is not None:
        _record.append(Launch(kernel, grid, warps, arguments))
        return
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        # Triton 3.10 changes the default of fp fusion: said out loud, the numbers stay
        kernel[grid](**arguments, num_warps=warps, enable_fp_fusion=True)
