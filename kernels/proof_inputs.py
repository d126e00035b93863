"""Small inputs of every operator, drawn, and plain torch of the same signature where the reference has another.

Sides are odd in float32 and, with other net or tensor types, multiples of 16 as well, because Triton compiles loads of
its own for those. What costs time is compiling, a fraction of a second a kernel, so forms and types share cases.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hflow_rt.kernels import (
    batch_norm,
    group_norm,
    instance_norm,
    logistic_mixture,
    mixture_image,
    mixture_kernels,
    residual_normal,
    squeeze_excite,
)
from hflow_rt.kernels.coupling import Form, Region
from hflow_rt.kernels.moments import moments_reference

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


def blurs(sizes: dict[torch.dtype, tuple[int, ...]]) -> tuple[Case, ...]:
    """With the moments of the result in float32; those of a half type are of what was rounded."""

    def case(dtype: torch.dtype, size: tuple[int, ...]) -> Case:
        emit = dtype == torch.float32
        return Case(f"{_name(dtype)} {list(size)}", lambda draw: ((2 + draw(*size)).to(dtype), emit))

    return tuple(case(dtype, size) for dtype, size in sizes.items())


def norms() -> tuple[Case, ...]:
    """Whole planes and parts of one, with style, moments and residual, and without."""

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


def group_norms() -> tuple[Case, ...]:
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


def group_norm_reference(
    x: Tensor, skip: Tensor | None, level: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The result, differentiable, and the moments."""
    still = (None if t is None else t.detach() for t in (skip, level))
    moments = group_norm.moments_of_groups(x.detach(), next(still), next(still), groups)
    return group_norm.group_norm_silu_reference(x, skip, level, weight, bias, groups), moments


def batch_norms() -> tuple[Case, ...]:
    """Whole planes and parts of one."""

    def case(dtype: torch.dtype, size: tuple[int, ...]) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            return (2 + draw(*size)).to(dtype), 1 + 0.3 * draw(size[1]), draw(size[1])

        return Case(f"{_name(dtype)} {list(size)}", inputs)

    side = math.isqrt(group_norm.PART) + 1  # the smallest plane that is cut in parts
    sizes = {torch.float32: [(5, 3, 3, 5), (2, 1, side, side)], HALF: [(2, 3, 5, 7)], BRAIN: [(2, 4, 16, 16)]}
    return tuple(case(dtype, size) for dtype, listed in sizes.items() for size in listed)


def batch_norm_reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The result, differentiable, and the moments."""
    return batch_norm.batch_norm_silu_reference(x, weight, bias), batch_norm.moments_of_channels(x.detach())


def _mixtures(dtype: torch.dtype, count: int, channels: int, *sides: int) -> Callable[[Draw], tuple[Tensor, Tensor]]:
    """Logits of so many logistics, wide and narrow, and an image of bytes from all but far tails of each."""

    def drawn(draw: Draw) -> tuple[Tensor, Tensor]:
        image = (127.5 + 100 * draw(2, channels, *sides)).round().clamp(0, 255) / 255
        logits = draw(2, count * mixture_kernels.parameters_of(channels), *sides)
        means, scales = torch.unflatten(logits[:, count:], 1, (channels, -1, count)).unbind(2)[:2]
        scales.sub_(2)
        of = logistic_mixture.logistics(logits, channels)
        y = (2 * image - 1)[:, :, None]
        means.mul_(4 * scales.exp()).add_(y)
        if of.coefficients is not None:
            means[:, 1:].sub_(of.coefficients[:, :2] * y[:, :1])
            means[:, 2:].sub_(of.coefficients[:, 2:] * y[:, 1:2])
        return logits.to(dtype), image

    return drawn


def log_probs() -> tuple[Case, ...]:
    """Of one channel and three, exact and as published."""

    def case(dtype: torch.dtype, count: int, channels: int, sides: tuple[int, int], published: bool) -> Case:
        drawn = _mixtures(dtype, count, channels, *sides)
        told = f"{_name(dtype)} {count} logistics, {channels} channels {list(sides)}"
        return Case(f"{told}, published" if published else told, lambda draw: (*drawn(draw), 8, published))

    return (
        case(torch.float32, 3, 3, (13, 11), False),
        case(torch.float32, 2, 1, (3, 5), True),
        case(HALF, 5, 1, (5, 7), False),
        case(BRAIN, 2, 3, (16, 16), True),
    )


def log_prob_reference(logits: Tensor, image: Tensor, bits: int, published: bool) -> tuple[Tensor, Tensor]:
    """The result, differentiable by the logits, and the sums."""
    given = (image.detach(), bits, published)
    sums = logistic_mixture.sums_of(logits.detach(), *given)
    return logistic_mixture.mixture_log_prob_reference(logits, *given), sums


def images() -> tuple[Case, ...]:
    """Means and draws, of one channel and three, as numbers and as bytes."""

    def case(dtype: torch.dtype, channels: int, sides: tuple[int, int], drawn: bool, as_bytes: bool) -> Case:
        made = _mixtures(dtype, 4, channels, *sides)

        def inputs(draw: Draw) -> tuple[Any, ...]:
            logits, _ = made(draw)
            if not drawn:
                return logits, None, None, None, channels, as_bytes
            choice, uniform = (draw(2, many, *sides).mul(7).remainder(1) for many in (4, channels))
            return logits, choice, uniform, mixture_image.gumbel_steps(draw.device), channels, as_bytes

        kind = "draw" if drawn else "mean"
        told = f"{_name(dtype)} {kind}, {channels} channels {list(sides)}"
        return Case(f"{told}, bytes" if as_bytes else told, inputs)

    return (
        case(torch.float32, 3, (13, 11), False, False),
        case(torch.float32, 3, (13, 11), True, True),
        case(torch.float32, 1, (3, 5), True, False),
        case(HALF, 1, (5, 7), False, True),
        case(BRAIN, 3, (16, 16), True, False),
    )


def image_reference(*inputs: Any) -> Tensor:
    """Not differentiable."""
    return mixture_image.mixture_image_reference(*inputs).detach()


def residuals() -> tuple[Case, ...]:
    """Values and divergences, and the costs of latents elsewhere; priors of every pixel and one for all."""

    def case(dtype: torch.dtype, size: tuple[int, ...], *, of_all: bool = False, moved: bool, relative: bool) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            batch, channels, *sides = size
            prior = draw(*((1, 2 * channels, 1, 1) if of_all else (batch, 2 * channels, *sides)), dtype=dtype)
            z = draw(*size) if moved else None
            return draw(batch, 2 * channels, *sides, dtype=dtype), prior, draw(*size), z, relative

        words = [("one prior", of_all), ("moved", moved), ("relative", relative)]
        told = [word for word, there in words if there]
        return Case(", ".join([f"{_name(dtype)} {list(size)}", *told]), inputs)

    return (
        case(torch.float32, (3, 5, 3, 5), moved=False, relative=True),
        case(torch.float32, (2, 3, 5, 7), of_all=True, moved=True, relative=True),
        case(HALF, (2, 3, 5, 7), moved=True, relative=False),
        case(BRAIN, (2, 4, 16, 16), of_all=True, moved=False, relative=False),
    )


def residual_reference(
    raw: Tensor, prior: Tensor, noise: Tensor, z: Tensor | None, relative: bool
) -> tuple[Tensor, Tensor]:
    """Not differentiable by the noise."""
    return residual_normal.residual_normal_reference(raw, prior, noise.detach(), z, relative)


def excitements() -> tuple[Case, ...]:
    """Whole planes and parts of one."""

    def case(dtype: torch.dtype, size: tuple[int, ...]) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            channels = size[1]
            layers = (draw(4, channels), draw(4), draw(channels, 4), draw(channels))
            return draw(*size, dtype=dtype), (1 + draw(*size)).to(dtype), *layers, 0.1

        return Case(f"{_name(dtype)} {list(size)}", inputs)

    side = math.isqrt(group_norm.PART) + 1  # the smallest plane that is cut in parts
    sizes = {torch.float32: [(5, 3, 3, 5), (1, 2, side, side)], HALF: [(2, 3, 5, 7)], BRAIN: [(2, 4, 16, 16)]}
    return tuple(case(dtype, size) for dtype, listed in sizes.items() for size in listed)


def excite_reference(skip: Tensor, y: Tensor, *layers: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result, differentiable, and means and gate."""
    means = y.detach().mean((2, 3))
    gate = squeeze_excite.gate_of(means, *(layer.detach() for layer in layers[:-1]))
    return squeeze_excite.squeeze_excite_reference(skip, y, *layers), means, gate


def updates() -> tuple[Case, ...]:
    """A step of a sampler."""

    def case(dtype: torch.dtype, size: tuple[int, ...]) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            tensors = tuple(draw(*size, dtype=dtype) for _ in range(4))
            return *tensors, draw(size[0], dtype=dtype), draw(size[0], dtype=dtype)

        return Case(f"{_name(dtype)} {list(size)}", inputs)

    return tuple(
        case(dtype, size)
        for dtype, size in ((torch.float32, (3, 3, 19, 21)), (HALF, (2, 1, 5, 7)), (BRAIN, (2, 4, 16, 16)))
    )


def norm_reference(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, moments: Tensor | None, leaky: bool
) -> tuple[Tensor, Tensor]:
    """The result, differentiable, and the moments where they are not given."""
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


def couplings() -> tuple[Case, ...]:
    """Every form in both directions, with every kind of map."""

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


def mixings() -> tuple[Case, ...]:
    """Full maps and diagonal ones, with a level's outer map."""

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
