"""What every operator is held against when it first meets a GPU: small odd-sized inputs, and plain torch in float64.

The truth is computed on the CPU, whatever the device, so it costs the GPU nothing and no other kernel is trusted with
it. Sides are odd in float32 and, with other net or tensor types, multiples of 16 as well, because Triton compiles loads
of its own for those. What costs time is compiling, a fraction of a second a kernel, so forms and types share cases.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hflow_rt.kernels import blur, coupling, group_norm, instance_norm, mixing, sampler_update
from hflow_rt.kernels.coupling import Form, Region
from hflow_rt.kernels.moments import moments_reference

__all__ = ["PROOFS", "Case", "Difference", "Proof", "largest_difference", "tolerance"]

HALF, BRAIN = torch.float16, torch.bfloat16


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
    `log`, exact to 2^-21, stay below a third of this, and a constant that is wrong by 1e-4 is ten times as much."""
    return max(1e-5, torch.finfo(dtype).eps)


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


def _blurs(sizes: dict[torch.dtype, tuple[int, ...]]) -> tuple[Case, ...]:
    """With the moments of the result in float32; those of a half type are of what was rounded."""

    def case(dtype: torch.dtype, size: tuple[int, ...]) -> Case:
        emit = dtype == torch.float32
        return Case(f"{_name(dtype)} {list(size)}", lambda draw: ((2 + draw(*size)).to(dtype), emit))

    return tuple(case(dtype, size) for dtype, size in sizes.items())


def _norms() -> tuple[Case, ...]:
    def case(
        dtype: torch.dtype, size: tuple[int, ...], *, style: bool = False, known: bool = False, rest: bool = False
    ) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            x = (2 + draw(*size)).to(dtype)
            scale, shift = draw(size[0], 2 * size[1], dtype=dtype).chunk(2, 1) if style else (None, None)
            moments = moments_reference(x.cpu().double()).float().to(draw.device) if known else None
            return x, scale, shift, draw(*size, dtype=dtype) if rest else None, moments, rest

        told = [word for word, there in (("style", style), ("moments", known), ("leaky, residual", rest)) if there]
        return Case(", ".join([f"{_name(dtype)} {list(size)}", *told]), inputs)

    side = math.isqrt(instance_norm.WHOLE) + 1  # the smallest plane that is cut in parts
    return (
        case(torch.float32, (5, 3, 3, 5), style=True, rest=True),
        case(torch.float32, (1, 2, side, side)),
        case(HALF, (2, 3, 5, 7)),
        case(BRAIN, (2, 4, 16, 16), style=True, known=True),
    )


def _group_norms() -> tuple[Case, ...]:
    """One tensor and two, whose groups may lie in both; without a level, with one for all samples and one for each."""

    def case(
        dtype: torch.dtype, size: tuple[int, ...], groups: int, *, skip: int = 0, level: tuple[int, ...] = ()
    ) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            batch, first, *sides = size
            channels = first + skip
            more = (2 + draw(batch, skip, *sides)).to(dtype) if skip else None
            moved = draw(*level, channels, dtype=dtype) if level or not skip else None
            return (2 + draw(*size)).to(dtype), more, moved, 1 + 0.3 * draw(channels), draw(channels), groups

        two = f" and {skip} channels" if skip else ""
        return Case(f"{_name(dtype)} {list(size)}{two}, {groups} groups, level {list(level)}", inputs)

    side = math.isqrt(group_norm.PART) + 1  # the smallest plane that is cut in parts
    return (
        case(torch.float32, (5, 6, 3, 5), 3, level=(5,)),
        case(torch.float32, (1, 4, side, side), 2, skip=2),
        case(HALF, (2, 5, 5, 7), 4, skip=3, level=(2,)),
        case(BRAIN, (2, 4, 16, 16), 2),
    )


def _group_norm_reference(
    x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    still = (None if t is None else t.detach() for t in (skip, level))
    moments = group_norm.moments_of_groups(x.detach(), next(still), next(still), groups)
    return group_norm.group_norm_silu_reference(x, skip, level, weight, bias, groups), moments


def _updates() -> tuple[Case, ...]:
    def case(dtype: torch.dtype, size: tuple[int, ...]) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            tensors = tuple(draw(*size, dtype=dtype) for _ in range(4))
            return *tensors, draw(size[0], dtype=dtype), draw(size[0], dtype=dtype)

        return Case(f"{_name(dtype)} {list(size)}", inputs)

    return tuple(
        case(dtype, size)
        for dtype, size in ((torch.float32, (3, 3, 19, 21)), (HALF, (2, 1, 5, 7)), (BRAIN, (2, 4, 16, 16)))
    )


def _norm_reference(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, moments: Tensor | None, leaky: bool
) -> tuple[Tensor, Tensor]:
    made = x.new_empty(0) if moments is not None else moments_reference(x.detach())
    return instance_norm.instance_norm_act_reference(x, scale, shift, residual, leaky), made


def _map(draw: Draw, channels: int, kind: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A channel map's weight, bias and inverse, as well conditioned as those of a trained model."""
    if kind == "no":
        return None, None, None
    if kind == "diagonal":
        weight = torch.exp(0.3 * draw(channels))
        return weight, draw(channels), 1 / weight
    weight = torch.eye(channels, device=draw.device) + 0.2 * draw(channels, channels)
    undo = np.linalg.inv(weight.cpu().double().numpy())
    return weight, draw(channels), torch.from_numpy(undo).float().to(draw.device)


def _couplings() -> tuple[Case, ...]:
    def case(
        form: Form, inverse: bool, size: tuple[int, ...], region: Region, kind: str,
        net: torch.dtype = torch.float32, post: bool = False,
    ) -> Case:  # fmt: skip
        def inputs(draw: Draw) -> tuple[Any, ...]:
            b, c, h, w = size
            raw = draw(b, 2 * (region.high - region.low), h, w)
            log_scale, shift = torch.stack([2 * raw[:, 0::2], 4 * raw[:, 1::2]], 2).flatten(1, 2).to(net).chunk(2, 1)
            outer = (draw(*size), 0.3 * draw(*size)) if post else (None, None)
            weight, bias, undo = _map(draw, c, kind)
            given = None if form == "additive" else log_scale
            return draw(*size), given, shift, weight, bias, undo, *outer, list(region), inverse, form

        towards = "image to latent" if inverse else "latent to image"
        return Case(f"{form}, {towards}, {kind} map, net {_name(net)} {list(size)}", inputs)

    half, odd = Region(2, 4), (2, 4, 3, 5)
    return (
        case("clipped", False, (2, 3, 5, 7), Region(0, 3, 1, 1, 1), "full", post=True),
        case("clipped", True, (1, 2, 16, 16), Region(0, 2, 8, 8, 0), "diagonal", post=True),
        case("sigmoid", False, (1, 4, 8, 16), half, "no", net=BRAIN),
        case("sigmoid", True, (2, 3, 5, 7), Region(1, 3), "full", net=HALF),
        case("exp_sigmoid", False, odd, half, "diagonal"),
        case("exp_sigmoid", True, odd, half, "no"),
        case("additive", False, odd, half, "no"),
        case("additive", True, odd, half, "diagonal"),
    )


def _mixings() -> tuple[Case, ...]:
    def case(size: tuple[int, ...], kind: str, inverse: bool, outer: torch.dtype) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            weight, bias, _ = _map(draw, size[1], kind)
            pre = (draw(*size, dtype=outer), (0.3 * draw(*size)).to(outer))
            return draw(*size), weight, bias, *pre, inverse

        towards = "image to latent" if inverse else "latent to image"
        return Case(f"{kind} map, {towards}, outer map {_name(outer)} {list(size)}", inputs)

    return (
        case((2, 3, 5, 7), "full", False, torch.float32),
        case((2, 2, 8, 16), "full", True, BRAIN),
        case((5, 3, 3, 5), "diagonal", True, HALF),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PROOFS = {
    "blur_down": Proof(
        blur._down, blur._remember_size, blur._differentiate_down, blur._down_aten, ("x",), ("result", "moments"),
        _blurs({torch.float32: (1, 3, 35, 5), HALF: (2, 3, 5, 7), BRAIN: (2, 4, 4, 16)}),
    ),
    "blur_up": Proof(
        blur._up, blur._remember_size, blur._differentiate_up, blur._up_aten, ("x",), ("result", "moments"),
        _blurs({torch.float32: (1, 3, 19, 5), HALF: (2, 3, 5, 7), BRAIN: (2, 4, 4, 16)}),
    ),
    "coupling": Proof(
        coupling._coupling, coupling._remember, coupling._differentiate, coupling._coupling_aten,
        ("x", "log_scale", "shift", "weight", "bias", "undo", "post shift", "post log_scale"), ("result", "log_det"),
        _couplings(),
    ),
    "group_norm_silu": Proof(
        group_norm._norm, group_norm._remember, group_norm._differentiate, _group_norm_reference,
        ("x", "skip", "level", "weight", "bias"), ("result", "moments"), _group_norms(),
    ),
    "instance_norm_act": Proof(
        instance_norm._norm, instance_norm._remember, instance_norm._differentiate, _norm_reference,
        ("x", "scale", "shift", "residual", "moments"), ("result", "moments"), _norms(),
    ),
    "mixing": Proof(
        mixing._mixing, mixing._remember, mixing._differentiate, mixing._mixing_aten,
        ("x", "weight", "bias", "pre shift", "pre log_scale"), ("result",), _mixings(),
    ),
    "sampler_update": Proof(
        sampler_update._update, sampler_update._remember, sampler_update._differentiate,
        sampler_update.sampler_update_reference, ("state", "change", "noise", "rest", "noise_weight", "rest_weight"),
        ("result", "image"), _updates(),
    ),
}  # fmt: skip
