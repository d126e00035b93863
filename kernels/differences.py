"""How an operator is held against plain torch in float64: its results and gradients on inputs that are drawn."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Case", "Difference", "Draw", "Proof", "largest_difference", "tolerance"]


class Draw:
    """Normal numbers on `device`, the same on every machine, without any of torch's generators."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._random = device, np.random.default_rng(0)

    def __call__(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(self._random.standard_normal(size)).to(dtype).to(self.device)


@dataclass(frozen=True)
class Case:
    """Inputs of an operator, drawn, and what they are in words."""

    what: str
    inputs: Callable[[Draw], tuple[Any, ...]]


@dataclass(frozen=True)
class Proof:
    """An operator, its rules of differentiation, and plain torch of the same signature.

    inputs, outputs: names of the tensors that come first among the operator's inputs, and of all its outputs.
    """

    operator: Callable[..., Any]
    remember: Callable[..., None]
    differentiate: Callable[..., tuple[Any, ...]]
    reference: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Difference:
    """The largest difference of an output or gradient from the truth, in units of the truth's largest number."""

    what: str
    off: float
    tolerance: float

    @property
    def share(self) -> float:
        """Of the tolerance; infinite for what is no number."""
        return self.off / self.tolerance if math.isfinite(self.off) else math.inf


def tolerance(dtype: torch.dtype) -> float:
    """Of the largest number. Rounding to a half type is half of its epsilon; in float32 sums and Triton's own `exp` and
    `log`, exact to 2^-21, stay below a third of this, and a constant that is wrong by 1e-4 is ten times as much. A byte
    that is off by one is four hundred times as much."""
    return max(1e-5, torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)


def largest_difference(proof: Proof, device: torch.device) -> Difference:
    """The largest of all cases, by share of its tolerance. Raises whatever compiling or launching a kernel does."""
    found = [difference for case in proof.cases for difference in _differences(proof, case, device)]
    return max(found, key=lambda difference: difference.share)


class _Context:
    """What autograd hands to an operator's rules. Its engine is not asked: it runs gradients on a thread of the
    device, which may be the one that waits for this proof."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        pass


def _differences(proof: Proof, case: Case, device: torch.device) -> list[Difference]:
    inputs = case.inputs(Draw(device))
    count = len(proof.inputs)
    leaves = [None if t is None else t.cpu().double().requires_grad_() for t in inputs[:count]]
    truths = _several(proof.reference(*leaves, *inputs[count:]))
    above = [_weights(t) for t in truths]
    weighted = [(t * w).sum() for t, w in zip(truths, above, strict=True) if t.requires_grad]
    used = [t for t in leaves if t is not None]
    slopes: Iterator[Tensor | None] = repeat(None)  # of what is no smooth function
    if weighted:
        slopes = iter(torch.autograd.grad(torch.stack(weighted).sum(), used, allow_unused=True))

    context: Any = _Context()
    with torch.no_grad():
        made = proof.operator(*inputs)
        proof.remember(context, inputs, made)
        outputs = _several(made)
        gradients = proof.differentiate(context, *(w.to(y) for w, y in zip(above, outputs, strict=True)))

    pairs = list(zip(proof.outputs, outputs, truths, strict=True))
    for name, leaf, gradient in zip(proof.inputs, leaves, gradients, strict=False):
        truth = None if leaf is None else next(slopes)
        if truth is not None:
            pairs.append((f"the gradient by {name}", gradient, truth))
    return [_difference(f"{name}, {case.what}", found, truth.detach()) for name, found, truth in pairs]


def _several(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _weights(y: Tensor) -> Tensor:
    """Between 0 and 2, unlike anywhere else, and exact in every type."""
    return ((1 + torch.arange(y.numel(), dtype=torch.float64).sin()) * 64).round().div(64).view(y.shape)


def _difference(what: str, found: Tensor, truth: Tensor) -> Difference:
    if found.shape != truth.shape:
        raise ValueError(f"{what} must be {list(truth.shape)}, not {list(found.shape)}")
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    off = float((found.cpu().double() - truth).abs().max()) if truth.numel() else 0.0
    return Difference(what, off / largest if largest else math.inf if off else 0.0, tolerance(found.dtype))
