"""What every operator is held against when it first meets a GPU: small odd-sized inputs, and plain torch in float64.

The truth is computed on the CPU, whatever the device, so it costs the GPU nothing and no other kernel is trusted with
it. Sides are odd in float32 and, with other net or tensor types, multiples of 16 as well, because Triton compiles loads
of its own for those. What costs time is compiling, a fraction of a second a kernel, so forms and types share cases.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hflow_rt.kernels import (
    bias_act,
    blur,
    coupling,
    group_norm,
    instance_norm,
    mixing,
    modulated_weights,
    quantise,
    sampler_update,
    split_act,
)
from hflow_rt.kernels.coupling import Form, Region
from hflow_rt.kernels.differences import Case, Draw, Proof
from hflow_rt.kernels.moments import moments_reference

__all__ = ["PROOFS"]

HALF, BRAIN = torch.float16, torch.bfloat16


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


def _acts() -> tuple[Case, ...]:
    def case(dtype: torch.dtype, size: tuple[int, ...], clamp: float | None = None, bias: bool = True) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            return draw(*size, dtype=dtype), draw(size[1]) if bias else None, 0.2, 1.5, clamp

        return Case(f"{_name(dtype)} {list(size)}{' clamped' if clamp else ''}", inputs)

    return (
        case(torch.float32, (3, 5, 9, 121), clamp=1.0),
        case(HALF, (2, 3, 5, 7), bias=False),
        case(BRAIN, (2, 16, 16, 16)),
    )


def _splits() -> tuple[Case, ...]:
    def case(dtype: torch.dtype, size: tuple[int, int, int], mode: str) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            batch, channels, side = size
            high, low = draw(batch, channels, 2 * side, 2 * side), draw(batch, channels, side, side)
            return high.to(dtype), low.to(dtype), draw(channels), mode

        return Case(f"{mode}, {_name(dtype)} {list(size)}", inputs)

    return (
        case(torch.float32, (1, 2, 17), "bilinear"),
        case(HALF, (3, 5, 2), "bilinear"),
        case(BRAIN, (2, 4, 8), "nearest"),
    )


def _modulations() -> tuple[Case, ...]:
    def case(dtype: torch.dtype, size: tuple[int, int, int, int], columns: bool) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            batch, c_out, c_in, rank = size
            factors = 1 + 0.3 * draw(batch, c_in) if columns else None
            return draw(batch, (c_out + c_in) * rank, dtype=dtype), draw(c_out, c_in), factors, rank, 0.5

        return Case(f"style {_name(dtype)} {list(size)}{', columns' if columns else ''}", inputs)

    return (
        case(torch.float32, (3, 33, 70, 3), True),
        case(HALF, (2, 5, 7, 2), False),
        case(BRAIN, (2, 16, 32, 4), False),
    )


def _bytes() -> tuple[Case, ...]:
    """Of numbers whose product with 255 float32 holds, so that half a level is half a level."""

    def case(dtype: torch.dtype, size: tuple[int, ...]) -> Case:
        return Case(
            f"{_name(dtype)} {list(size)}",
            lambda draw: (((0.5 + draw(*size)).mul(1024).round() / 1024).to(dtype),),
        )

    return case(torch.float32, (2, 3, 35, 33)), case(HALF, (1, 1, 5, 7)), case(BRAIN, (2, 3, 16, 16))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PROOFS = {
    "bias_act": Proof(
        bias_act._act, bias_act._remember, bias_act._differentiate, bias_act.bias_act_reference, ("x", "bias"),
        ("result",), _acts(),
    ),
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
    "modulated_weights": Proof(
        modulated_weights._generate, modulated_weights._remember, modulated_weights._differentiate,
        modulated_weights.modulated_weights_reference, ("style", "weight", "columns"), ("result",), _modulations(),
    ),
    "quantise": Proof(
        quantise._quantise, quantise._remember, quantise._differentiate, quantise.quantise_reference, ("images",),
        ("result",), _bytes(),
    ),
    "sampler_update": Proof(
        sampler_update._update, sampler_update._remember, sampler_update._differentiate,
        sampler_update.sampler_update_reference, ("state", "change", "noise", "rest", "noise_weight", "rest_weight"),
        ("result", "image"), _updates(),
    ),
    "split_act": Proof(
        split_act._split, split_act._remember, split_act._differentiate, split_act.split_act_reference,
        ("high", "low", "bias"), ("result",), _splits(),
    ),
}  # fmt: skip
