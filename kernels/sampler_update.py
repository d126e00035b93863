"""What a step of a sampler makes of its state, the net's change and noise, in one pass (ihdm spec 11a).

next = state + change + noise_weight * noise + rest_weight * rest        image = clamp(next, 0, 1)
"""

from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels.dispatch import jit, launch, operator, takes, tl
from hflow_rt.kernels.moments import statistics_dtype

__all__ = ["sampler_update", "sampler_update_reference"]


def sampler_update(
    state: Tensor, change: Tensor, noise: Tensor, rest: Tensor, noise_weight: Tensor, rest_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The next state and the same as an image in [0, 1], each `[B, C, H, W]` as the first four; weights `[B]` or `[1]`.

    All of one type.
    """
    if takes(state):
        weights = (weight.expand(len(state)) for weight in (noise_weight, rest_weight))
        made: tuple[Tensor, Tensor] = _update(state, change, noise, rest, *weights)
        return made
    return sampler_update_reference(state, change, noise, rest, noise_weight, rest_weight)


def sampler_update_reference(
    state: Tensor, change: Tensor, noise: Tensor, rest: Tensor, noise_weight: Tensor, rest_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`sampler_update` in plain torch."""
    drawn, known = noise_weight[:, None, None, None], rest_weight[:, None, None, None]
    made = state + change + drawn * noise + known * rest
    return made, made.clamp(0, 1)


def _update_aten(
    state: Tensor, change: Tensor, noise: Tensor, rest: Tensor, noise_weight: Tensor, rest_weight: Tensor
) -> tuple[Tensor, Tensor]:
    made, image = sampler_update_reference(state, change, noise, rest, noise_weight, rest_weight)
    return made.contiguous(), image.contiguous()


@jit
def _update_kernel(
    state, change, noise, rest, noise_weight, rest_weight, made, image, many, NUMBERS: tl.constexpr,
):  # fmt: skip
    """A program makes `NUMBERS` of the `many` numbers of one sample."""
    sample = tl.program_id(1)
    number = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    inside = number < many
    at = sample.to(tl.int64) * many + number
    mean = tl.load(state + at, inside, 0.0).to(tl.float32) + tl.load(change + at, inside, 0.0).to(tl.float32)
    drawn = tl.load(noise_weight + sample).to(tl.float32) * tl.load(noise + at, inside, 0.0).to(tl.float32)
    known = tl.load(rest_weight + sample).to(tl.float32) * tl.load(rest + at, inside, 0.0).to(tl.float32)
    result = mean + drawn + known
    tl.store(made + at, result.to(made.dtype.element_ty), inside)
    tl.store(image + at, tl.minimum(tl.maximum(result, 0.0), 1.0).to(image.dtype.element_ty), inside)


def _check(state: Tensor, *others: Tensor) -> None:
    *alike, noise_weight, rest_weight = others
    if any(other.shape != state.shape for other in alike):
        raise ValueError(f"change, noise and rest must be {list(state.shape)}, as the state is")
    if any(weight.shape != state.shape[:1] for weight in (noise_weight, rest_weight)):
        raise ValueError(f"weights must be {list(state.shape[:1])}, one a sample")


def _update_triton(
    state: Tensor, change: Tensor, noise: Tensor, rest: Tensor, noise_weight: Tensor, rest_weight: Tensor
) -> tuple[Tensor, Tensor]:
    _check(state, change, noise, rest, noise_weight, rest_weight)
    made, image = (torch.empty(state.shape, dtype=state.dtype, device=state.device) for _ in range(2))
    batch, many, numbers = len(state), state[0].numel(), 1024
    launch(
        _update_kernel, (-(-many // numbers), batch), 4,
        state=state.contiguous(), change=change.contiguous(), noise=noise.contiguous(), rest=rest.contiguous(),
        noise_weight=noise_weight.contiguous(), rest_weight=rest_weight.contiguous(),
        made=made, image=image, many=many, NUMBERS=numbers,
    )  # fmt: skip
    return made, image


_update = operator("sampler_update", _update_triton, _update_aten)


@_update.register_fake
def _(
    state: Tensor, change: Tensor, noise: Tensor, rest: Tensor, noise_weight: Tensor, rest_weight: Tensor
) -> tuple[Tensor, Tensor]:
    _check(state, change, noise, rest, noise_weight, rest_weight)
    return state.new_empty(state.shape), state.new_empty(state.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, g: Tensor, g_image: Tensor) -> tuple[Tensor, ...]:
    """In plain torch: samples are seldom differentiated."""
    inputs = [t.to(statistics_dtype(t)) for t in ctx.saved_tensors]
    made, _ = sampler_update_reference(*inputs)
    _, _, noise, rest, *weights = inputs
    whole = g + torch.where((made >= 0) & (made <= 1), g_image, 0)
    by_tensors = [whole, whole, *(whole * weight[:, None, None, None] for weight in weights)]
    by_weights = [(whole * other).flatten(1).sum(1) for other in (noise, rest)]
    return tuple(d.to(g.dtype) for d in (*by_tensors, *by_weights))


_update.register_autograd(_differentiate, setup_context=_remember)
