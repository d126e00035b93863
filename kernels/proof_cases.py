"""What every operator is held against when it first meets a GPU: small inputs, and plain torch in float64.

The truth is computed on the CPU, whatever the device, so it costs the GPU nothing and no other kernel is trusted with
it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels import (
    batch_norm,
    bias_act,
    blur,
    coupling,
    group_norm,
    instance_norm,
    logistic_mixture,
    mixing,
    mixture_image,
    modulated_weights,
    quantise,
    residual_normal,
    sampler_update,
    split_act,
    squeeze_excite,
)
from hflow_rt.kernels import generator_inputs as generator
from hflow_rt.kernels import proof_inputs as inputs
from hflow_rt.kernels.proof_inputs import BRAIN, HALF, Case, Draw

__all__ = ["PROOFS", "Difference", "Proof", "largest_difference", "tolerance"]


@dataclass(frozen=True)
class Proof:
    """An operator, its rules of differentiation, and plain torch of the same signature, differentiable by what has a
    gradient; the rules do nothing where that is nothing.

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
    `log`, exact to 2^-21, stay below a third of this, and a constant that is wrong by 1e-4 is ten times as much. Bytes
    must be the same."""
    if dtype == torch.uint8:
        return 0.5 / 255
    return max(1e-5, torch.finfo(dtype).eps)


def largest_difference(proof: Proof, device: torch.device) -> Difference:
    """The largest by share of its tolerance, of all cases, or of the first that is wrong.

    Raises whatever compiling or launching a kernel does.
    """
    found: list[Difference] = []
    for case in proof.cases:
        found += _differences(proof, case, device)
        if not max(difference.share for difference in found) <= 1:
            break
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
    slopes: Iterator[Tensor | None] = iter([None] * len(used))
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


def _nothing(*_: Any) -> Any:
    """The rules of what has no gradient."""
    return ()


PROOFS = {
    "batch_norm_silu": Proof(
        batch_norm._norm, batch_norm._remember, batch_norm._differentiate, inputs.batch_norm_reference,
        ("x", "weight", "bias"), ("result", "moments"), inputs.batch_norms(),
    ),
    "bias_act": Proof(
        bias_act._act, bias_act._remember, bias_act._differentiate, bias_act.bias_act_reference, ("x", "bias"),
        ("result",), generator.acts(),
    ),
    "blur_down": Proof(
        blur._down, blur._remember_size, blur._differentiate_down, blur._down_aten, ("x",), ("result", "moments"),
        inputs.blurs({torch.float32: (1, 3, 35, 5), HALF: (2, 3, 5, 7), BRAIN: (2, 4, 4, 16)}),
    ),
    "blur_up": Proof(
        blur._up, blur._remember_size, blur._differentiate_up, blur._up_aten, ("x",), ("result", "moments"),
        inputs.blurs({torch.float32: (1, 3, 19, 5), HALF: (2, 3, 5, 7), BRAIN: (2, 4, 4, 16)}),
    ),
    "coupling": Proof(
        coupling._coupling, coupling._remember, coupling._differentiate, coupling._coupling_aten,
        ("x", "log_scale", "shift", "weight", "bias", "undo", "post shift", "post log_scale"), ("result", "log_det"),
        inputs.couplings(),
    ),
    "group_norm_silu": Proof(
        group_norm._norm, group_norm._remember, group_norm._differentiate, inputs.group_norm_reference,
        ("x", "skip", "level", "weight", "bias"), ("result", "moments"), inputs.group_norms(),
    ),
    "instance_norm_act": Proof(
        instance_norm._norm, instance_norm._remember, instance_norm._differentiate, inputs.norm_reference,
        ("x", "scale", "shift", "residual", "moments"), ("result", "moments"), inputs.norms(),
    ),
    "mixing": Proof(
        mixing._mixing, mixing._remember, mixing._differentiate, mixing._mixing_aten,
        ("x", "weight", "bias", "pre shift", "pre log_scale"), ("result",), inputs.mixings(),
    ),
    "mixture_image": Proof(
        mixture_image._image, _nothing, _nothing, inputs.image_reference,
        ("logits", "choice", "uniform", "levels"), ("image",), inputs.images(),
    ),
    "mixture_log_prob": Proof(
        logistic_mixture._log_prob, logistic_mixture._remember, logistic_mixture._differentiate,
        inputs.log_prob_reference, ("logits", "image"), ("result", "sums"), inputs.log_probs(),
    ),
    "modulated_weights": Proof(
        modulated_weights._generate, modulated_weights._remember, modulated_weights._differentiate,
        modulated_weights.modulated_weights_reference, ("style", "weight", "columns"), ("result",),
        generator.modulations(),
    ),
    "quantise": Proof(
        quantise._quantise, _nothing, _nothing, quantise.quantise_reference, ("images",), ("result",),
        generator.rounded(),
    ),
    "residual_normal": Proof(
        residual_normal._residual, residual_normal._remember, residual_normal._differentiate, inputs.residual_reference,
        ("raw", "prior", "noise", "z"), ("value", "cost"), inputs.residuals(),
    ),
    "sampler_update": Proof(
        sampler_update._update, sampler_update._remember, sampler_update._differentiate,
        sampler_update.sampler_update_reference, ("state", "change", "noise", "rest", "noise_weight", "rest_weight"),
        ("result", "image"), inputs.updates(),
    ),
    "split_act": Proof(
        split_act._split, split_act._remember, split_act._differentiate, split_act.split_act_reference,
        ("high", "low", "bias"), ("result",), generator.splits(),
    ),
    "squeeze_excite": Proof(
        squeeze_excite._excite, squeeze_excite._remember, squeeze_excite._differentiate, inputs.excite_reference,
        ("skip", "y", "w_reduce", "b_reduce", "w_expand", "b_expand"), ("result", "means", "gate"),
        inputs.excitements(),
    ),
}  # fmt: skip
