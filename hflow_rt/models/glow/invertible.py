"""Backward through a chain of flow steps that keeps nothing but its output.

Each step's input is computed back from its output, so activations take the memory of one step whatever their number.
This costs one more subnet evaluation a step, as gradient checkpointing does. The recomputed values differ from the
first ones by the rounding of a round trip, and so do the gradients: by nothing to speak of in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from hflow_rt.models.glow.flow import FlowChain, FlowStep

__all__ = ["run_recomputed"]


def run_recomputed(chain: FlowChain, x: Tensor) -> tuple[Tensor, Tensor]:
    """`chain.run(x)`, differentiable once."""
    parameters = [parameter for parameter in chain.parameters() if parameter.requires_grad]
    y, log_dets = _Chain.apply(chain, x, *parameters)  # type: ignore[no-untyped-call]
    return y, log_dets


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: FlowChain, x: Tensor, *parameters: nn.Parameter) -> tuple[Tensor, Tensor]:
        ctx.chain, ctx.parameters = chain, parameters
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        y, log_dets = chain.run(x)
        ctx.save_for_backward(y)
        return y, log_dets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_log_dets: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        gradients: dict[nn.Parameter, Tensor] = {}
        steps = list(enumerate(ctx.chain.steps))
        with torch.autocast(**ctx.autocast):
            for index, step in reversed(steps):
                y, grad_y = _step_backward(step, y, grad_y, grad_log_dets[index], gradients)
        return None, grad_y, *(gradients.get(parameter) for parameter in ctx.parameters)


def _step_backward(
    step: FlowStep, y: Tensor, grad_y: Tensor, grad_log_det: Tensor, gradients: dict[nn.Parameter, Tensor]
) -> tuple[Tensor, Tensor]:
    """The step's input and its gradient from those of its output; gradients of parameters are put in `gradients`."""
    coupling = step.coupling
    with torch.enable_grad():
        halves = coupling.halves(y)
        stays = halves[0].detach().requires_grad_()
        raw = coupling.net(stays)
        with torch.no_grad():
            middle, _ = coupling.move(y, halves, raw, inverse=False)
        middle.requires_grad_()
        outputs = coupling.move(middle, coupling.halves(middle), raw, inverse=True)
    grad_stays, grad_middle = _pull(
        outputs, (grad_y, grad_log_det), (stays, middle), coupling.parameters(), gradients
    )  # fmt: skip
    with torch.no_grad():
        coupling.halves(grad_middle)[0].add_(grad_stays)
        x = step.actnorm(step.mixing(middle))
    with torch.enable_grad():
        x.requires_grad_()
        output = step.mixing.inverse(step.actnorm.inverse(x))
    linear = [*step.actnorm.parameters(), *step.mixing.parameters()]
    (grad_x,) = _pull((output,), (grad_middle,), (x,), linear, gradients)
    return x.detach(), grad_x


def _pull(
    outputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    parameters: Any,
    gradients: dict[nn.Parameter, Tensor],
) -> list[Tensor]:
    """Gradients of `inputs`; those of the parameters that have one are put in `gradients`."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # the log-determinant of an additive coupling is a constant
    live = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in live],
        [*inputs, *trained],
        [grad for _, grad in live],
        allow_unused=True,
    )
    for parameter, gradient in zip(trained, found[len(inputs) :], strict=True):
        if gradient is not None:
            gradients[parameter] = gradient
    return [torch.zeros_like(value) if g is None else g for value, g in zip(inputs, found, strict=False)]
