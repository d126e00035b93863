"""Affine coupling (hflow spec 2.5-2.11, glow spec 2.6; Dinh et al. 2017, eq. 7-8), alone or as a whole step boundary.

A coupling goes on to the channel map that follows (the actnorm of this step and the mixing of the next, merged) and to
the outer map of a level, if this is its last step: on CUDA one pass that reads x, r, t and writes the result, with the
log-determinant summed in two stages in a fixed order. Its gradient recomputes everything from the result, so no input
is kept. What is coupled how is in `coupling_forms`.
"""

from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels.channels import Elementwise, channel_map, check_maps, element_map, fits, in_registers, room
from hflow_rt.kernels.coupling_forms import (
    LOG_SCALE_BOUND,
    SHIFT_BOUND,
    Form,
    Region,
    clipped,
    coupling_forward,
    coupling_inverse,
    coupling_reference,
    gradients_from_result,
)
from hflow_rt.kernels.coupling_kernels import couple, couple_backward
from hflow_rt.kernels.dispatch import operator, takes

__all__ = [
    "LOG_SCALE_BOUND",
    "SHIFT_BOUND",
    "Form",
    "Region",
    "clipped",
    "coupling",
    "coupling_forward",
    "coupling_inverse",
    "coupling_reference",
]


def coupling(
    x: Tensor,
    log_scale: Tensor | None,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    region: Region,
    *,
    inverse: bool,
    form: Form,
    undo: Tensor | None = None,
    post: Elementwise | None = None,
) -> tuple[Tensor, Tensor]:
    """Couple `[B, C, H, W]` in `region`, then `weight u + bias` over channels, then `post`; with the log-det `[B]`.

    Latent to image, or where `inverse` image to latent. `log_scale` (None for additive) and `shift` have the channels
    of `x` or just those of the region, any strides, any floating type; the result has the type of `x`. `weight` is
    `[C, C]`, `[C]` for a diagonal or None, with `bias` `[C]`; `undo` is its inverse, which a gradient needs and else
    computes. The log-determinant is the coupling's only.
    """
    _check(x, log_scale, shift, weight, bias, region, form, post)
    if not takes(x) or not fits(x):
        return coupling_reference(x, log_scale, shift, weight, bias, region, inverse=inverse, form=form, post=post)
    if not in_registers(x, weight):
        y, log_det = _coupling(x, log_scale, shift, None, None, None, None, None, list(region), inverse, form)
        return element_map(channel_map(y, weight, bias), post, inverse), log_det
    outer_shift, outer_log_scale = (None, None) if post is None else post
    y, log_det = _coupling(
        x, log_scale, shift, weight, bias, undo, outer_shift, outer_log_scale, list(region), inverse, form
    )
    return y, log_det


def _check(
    x: Tensor, log_scale: Tensor | None, shift: Tensor, weight: Tensor | None, bias: Tensor | None,
    region: Region, form: str, post: Elementwise | None,
) -> None:  # fmt: skip
    check_maps(x, weight, bias, post)
    if (log_scale is None) != (form == "additive"):
        raise ValueError(f"a coupling of form '{form}' needs {'no' if log_scale is not None else 'a'} log-scale")
    fits = shift.shape[1] in (x.shape[1], region.high - region.low)
    if not fits or shift.shape[:1] + shift.shape[2:] != x.shape[:1] + x.shape[2:]:
        which = f"{list(x.shape)}, or channels {region.low} to {region.high} of it"
        raise ValueError(f"the shift must be {which}, not {list(shift.shape)}")
    if log_scale is not None and log_scale.shape != shift.shape:
        raise ValueError(f"the log-scale must be {list(shift.shape)} as the shift, not {list(log_scale.shape)}")


# -- operators: Triton on CUDA, plain torch on the CPU


def _coupling_aten(
    x: Tensor, log_scale: Tensor | None, shift: Tensor, weight: Tensor | None, bias: Tensor | None,
    undo: Tensor | None, post_shift: Tensor | None, post_log_scale: Tensor | None,
    region: list[int], inverse: bool, form: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, log_det = coupling_reference(
        x, log_scale, shift, weight, bias, Region(*region),
        inverse=inverse, form=form, post=_post(post_shift, post_log_scale),  # type: ignore[arg-type]
    )  # fmt: skip
    return y.contiguous(), log_det


def _post(shift: Tensor | None, log_scale: Tensor | None) -> Elementwise | None:
    return None if shift is None or log_scale is None else Elementwise(shift, log_scale)


def _coupling_backward_aten(
    g: Tensor, g_log_det: Tensor, y: Tensor, log_scale: Tensor | None, shift: Tensor,
    weight: Tensor | None, bias: Tensor | None, undo: Tensor | None,
    post_shift: Tensor | None, post_log_scale: Tensor | None, region: list[int], inverse: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return gradients_from_result(
        g, g_log_det, y, log_scale, shift, weight, bias, undo, Region(*region),
        inverse=inverse, form=form, post=_post(post_shift, post_log_scale),  # type: ignore[arg-type]
    )  # fmt: skip


_coupling = operator("coupling", couple, _coupling_aten)
_coupling_backward = operator("coupling_backward", couple_backward, _coupling_backward_aten, gradient_of="coupling")


@_coupling.register_fake
def _(
    x: Tensor, log_scale: Tensor | None, shift: Tensor, weight: Tensor | None, bias: Tensor | None,
    undo: Tensor | None, post_shift: Tensor | None, post_log_scale: Tensor | None,
    region: list[int], inverse: bool, form: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape[0])


@_coupling_backward.register_fake
def _(
    g: Tensor, g_log_det: Tensor, y: Tensor, log_scale: Tensor | None, shift: Tensor,
    weight: Tensor | None, bias: Tensor | None, undo: Tensor | None,
    post_shift: Tensor | None, post_log_scale: Tensor | None, region: list[int], inverse: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    likes = (y, log_scale, shift, weight, bias, post_shift, post_log_scale)
    return tuple(room(like, y) for like in likes)  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *tensors, region, ctx.inverse, ctx.form = inputs
    ctx.region = list(region)
    ctx.save_for_backward(output[0], *tensors)


def _differentiate(ctx: Any, g: Tensor, g_log_det: Tensor) -> tuple[Tensor | None, ...]:
    y, log_scale, shift, weight, bias, undo, *post = ctx.saved_tensors
    if undo is None and weight is not None:
        # rounded once; `inv_ex` looks not whether it was singular, which would wait for the device
        undo = 1 / weight if weight.dim() == 1 else torch.linalg.inv_ex(weight.double())[0].to(weight.dtype)
    d_x, *by_net_and_map, d_post_shift, d_post_log_scale = _coupling_backward(
        g, g_log_det, y, log_scale, shift, weight, bias, undo, *post, ctx.region, ctx.inverse, ctx.form
    )
    given = (log_scale, shift, weight, bias)
    by_given = [None if one is None else d for one, d in zip(given, by_net_and_map, strict=True)]
    by_post = (None, None) if post[0] is None else (d_post_shift, d_post_log_scale)
    return d_x, *by_given, None, *by_post, None, None, None


_coupling.register_autograd(_differentiate, setup_context=_remember)
