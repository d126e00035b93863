"""Images of mixtures of logistics, the mean or one draw, as floats or as the bytes of a picture (nvae spec 4.2, 12 I).

A choice by rounded numbers would turn on the last bit of a logarithm, and pixels would differ from one engine to the
next. What is compared is therefore a multiple of a small step, of which every arithmetic makes the same sums: draws are
one of so many levels, whose logarithms are constants, and logits move by less than half a step.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import jit, launch, operator, takes, tl
from hflow_rt.kernels.logistic_mixture import logistics
from hflow_rt.kernels.mixture_kernels import PIXELS, check, parameter_at, tanh
from hflow_rt.kernels.moments import statistics_dtype

__all__ = ["MIDDLES", "level", "mixture_image", "mixture_image_reference", "of_chosen", "whole_steps"]

LEVELS, STEP = 1 << 16, 1 / 1024


def mixture_image(
    logits: Tensor, channels: int, draws: tuple[Tensor, Tensor] | None = None, as_bytes: bool = False
) -> Tensor:
    """The mean image of the logits of `mixture_log_prob`, or one draw: `[B, C, H, W]` in [0, 1], float32 at least.

    draws: uniform numbers in [0, 1), `[B, M, H, W]` that choose a logistic for each pixel and `[B, C, H, W]` that
    choose a value of each colour. as_bytes: rounded to uint8 `[B, H, W, C]` instead, which has no gradient. Kernels
    take what needs none.
    """
    choice, uniform = (None, None) if draws is None else draws
    levels = None if draws is None else gumbel_steps(logits.device)
    if takes(logits) and not (torch.is_grad_enabled() and logits.requires_grad):
        made: Tensor = _image(logits, choice, uniform, levels, channels, as_bytes)
        return made
    return mixture_image_reference(logits, choice, uniform, levels, channels, as_bytes)


# -- plain torch


def level(uniform: Tensor) -> Tensor:
    """Numbers in [0, 1) as one of `LEVELS`."""
    return (uniform * LEVELS).floor().clamp(0, LEVELS - 1).long()


def whole_steps(values: Tensor) -> Tensor:
    """In whole steps, float32."""
    return (values.float() / STEP).round()


MIDDLES = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
_GUMBEL = whole_steps(-(-MIDDLES.log()).log())


def gumbel_steps(device: torch.device) -> Tensor:
    """Draws of Gumbel's distribution in whole steps, by level."""
    return _GUMBEL.to(device)


def mixture_image_reference(
    logits: Tensor,
    choice: Tensor | None,
    uniform: Tensor | None,
    levels: Tensor | None,
    channels: int,
    as_bytes: bool,
) -> Tensor:
    """`mixture_image` in plain torch. levels: steps of Gumbel's distribution that levels of `choice` stand for."""
    of = logistics(logits.to(statistics_dtype(logits)), channels)
    if choice is None or uniform is None or levels is None:
        weights = F.softmax(of.weights, 1)[:, None]
        coefficients = None if of.coefficients is None else (weights * of.coefficients).sum(2)
        image = _in_turn((weights * of.means).sum(2), coefficients)
    else:
        chosen = (whole_steps(of.weights) + levels[level(choice)]).argmax(1)
        logistic = _logistic(uniform.to(of.means))
        image = of_chosen(logits, chosen, logistic, channels)
    return (255 * image).round().to(torch.uint8).permute(0, 2, 3, 1) if as_bytes else image


def _logistic(uniform: Tensor) -> Tensor:
    """Draws of the standard logistic, of numbers moved into the published range, which has neither end."""
    inside = 1e-5 + (1 - 2e-5) * uniform
    return inside.log() - (-inside).log1p()


def of_chosen(logits: Tensor, chosen: Tensor, logistic: Tensor, channels: int) -> Tensor:
    """The image of draws `[B, C, H, W]` of the standard logistic, of the one `chosen` for each pixel, `[B, H, W]`."""
    of = logistics(logits, channels)
    chosen = chosen[:, None, None].expand(*logistic.shape[:2], 1, -1, -1)

    def value(values: Tensor) -> Tensor:
        return values.gather(2, chosen[:, : values.shape[1]]).squeeze(2)

    coefficients = None if of.coefficients is None else value(of.coefficients)
    return _in_turn(value(of.means) + value(of.log_scales).exp() * logistic, coefficients)


def _in_turn(values: Tensor, coefficients: Tensor | None) -> Tensor:
    """Colours `[B, C, H, W]` in [-1, 1], each clipped before the next depends on it, as an image."""
    if coefficients is None:
        y = values.clamp(-1.0, 1.0)
    else:
        k = coefficients.unbind(1)
        red, green, blue = values.unbind(1)
        red = red.clamp(-1.0, 1.0)
        green = (green + k[0] * red).clamp(-1.0, 1.0)
        blue = (blue + k[1] * red + k[2] * green).clamp(-1.0, 1.0)
        y = torch.stack((red, green, blue), 1)
    return 0.5 * y + 0.5


def _image_aten(
    logits: Tensor,
    choice: Tensor | None,
    uniform: Tensor | None,
    levels: Tensor | None,
    channels: int,
    as_bytes: bool,
) -> Tensor:
    return mixture_image_reference(logits, choice, uniform, levels, channels, as_bytes).contiguous()


# -- kernels: a lane owns a pixel


@jit
def _clipped(value):
    return tl.minimum(tl.maximum(value, -1.0), 1.0)


@jit
def _written(image, sample, pixel, pixels, at, value, inside, CHANNELS: tl.constexpr, AS_BYTES: tl.constexpr):
    """Store one colour, in [-1, 1]."""
    value = 0.5 * value + 0.5
    if AS_BYTES:
        to = image + (sample * pixels + pixel) * CHANNELS + at
        tl.store(to, tl.floor(255.0 * value + 0.5).to(tl.uint8), inside)
    else:
        tl.store(image + (sample * CHANNELS + at) * pixels + pixel, value, inside)


@jit
def _mean_kernel(
    logits, image, numbers, count, pixels, CHANNELS: tl.constexpr, AS_BYTES: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """A program makes `PIXELS` pixels of a sample, the last one again where there are fewer."""
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    pixel = tl.minimum(pixel, pixels - 1)
    at = logits + sample * numbers * pixels + pixel
    peak = tl.full((PIXELS,), -3e38, tl.float32)
    total = tl.zeros((PIXELS,), tl.float32)
    red = tl.zeros((PIXELS,), tl.float32)
    green, blue, first, second, third = red, red, red, red, red
    for m in range(count):
        weight = parameter_at(at, 0, count, pixels, m)
        higher = tl.maximum(peak, weight)
        kept = tl.exp(peak - higher)
        share = tl.exp(weight - higher)
        peak = higher
        total = total * kept + share
        red = red * kept + share * parameter_at(at, 1, count, pixels, m)
        if CHANNELS == 3:
            green = green * kept + share * parameter_at(at, 4, count, pixels, m)
            blue = blue * kept + share * parameter_at(at, 7, count, pixels, m)
            first = first * kept + share * tanh(parameter_at(at, 3, count, pixels, m))
            second = second * kept + share * tanh(parameter_at(at, 6, count, pixels, m))
            third = third * kept + share * tanh(parameter_at(at, 9, count, pixels, m))
    red = _clipped(red / total)
    _written(image, sample, pixel, pixels, 0, red, inside, CHANNELS, AS_BYTES)
    if CHANNELS == 3:
        green = _clipped((green + first * red) / total)
        blue = _clipped((blue + second * red + third * green) / total)
        _written(image, sample, pixel, pixels, 1, green, inside, CHANNELS, AS_BYTES)
        _written(image, sample, pixel, pixels, 2, blue, inside, CHANNELS, AS_BYTES)


@jit
def _drawn(at, uniform, chosen, mean, scale, count, pixels):
    """A draw of one colour of the chosen logistics; `mean` and `scale` are kinds of parameters."""
    drawn = 1e-5 + (1.0 - 2e-5) * tl.load(uniform).to(tl.float32)
    spread = tl.exp(tl.maximum(parameter_at(at, scale, count, pixels, chosen), -7.0))
    return parameter_at(at, mean, count, pixels, chosen) + spread * (tl.log(drawn) - tl.log(1.0 - drawn))


@jit
def _draw_kernel(
    logits, choice, uniform, levels, image, numbers, count, pixels,
    LEVELS: tl.constexpr, CHANNELS: tl.constexpr, AS_BYTES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    pixel = tl.minimum(pixel, pixels - 1)
    at = logits + sample * numbers * pixels + pixel
    best = tl.full((PIXELS,), -3e38, tl.float32)
    chosen = tl.zeros((PIXELS,), tl.int32)
    for m in range(count):
        drawn = tl.load(choice + (sample * count + m) * pixels + pixel).to(tl.float32)
        which = tl.minimum(tl.maximum(tl.floor(drawn * LEVELS), 0.0), LEVELS - 1.0).to(tl.int32)
        # adding and taking away 1.5 * 2^23 rounds half to even, as torch does
        steps = parameter_at(at, 0, count, pixels, m) * 1024.0 + 12582912.0 - 12582912.0
        score = steps + tl.load(levels + which)
        chosen = tl.where(score > best, m, chosen)
        best = tl.maximum(score, best)
    uniform += sample * CHANNELS * pixels + pixel
    red = _clipped(_drawn(at, uniform, chosen, 1, 2, count, pixels))
    _written(image, sample, pixel, pixels, 0, red, inside, CHANNELS, AS_BYTES)
    if CHANNELS == 3:
        green = _drawn(at, uniform + pixels, chosen, 4, 5, count, pixels)
        green = _clipped(green + tanh(parameter_at(at, 3, count, pixels, chosen)) * red)
        blue = _drawn(at, uniform + 2 * pixels, chosen, 7, 8, count, pixels)
        blue += tanh(parameter_at(at, 6, count, pixels, chosen)) * red
        blue = _clipped(blue + tanh(parameter_at(at, 9, count, pixels, chosen)) * green)
        _written(image, sample, pixel, pixels, 1, green, inside, CHANNELS, AS_BYTES)
        _written(image, sample, pixel, pixels, 2, blue, inside, CHANNELS, AS_BYTES)


# -- host


def _new(logits: Tensor, channels: int, as_bytes: bool) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of the image."""
    batch, _, height, width = logits.shape
    if as_bytes:
        return (batch, height, width, channels), torch.uint8
    return (batch, channels, height, width), statistics_dtype(logits)


def _check(logits: Tensor, choice: Tensor | None, uniform: Tensor | None, channels: int) -> int:
    draws = () if choice is None or uniform is None else (choice, uniform)
    count = check(logits, channels, *draws)
    if draws and (draws[0].shape[1], draws[1].shape[1]) != (count, channels):
        found = [draw.shape[1] for draw in draws]
        raise ValueError(f"draws must be of {count} logistics and {channels} channels, not {found}")
    return count


def _image_triton(
    logits: Tensor,
    choice: Tensor | None,
    uniform: Tensor | None,
    levels: Tensor | None,
    channels: int,
    as_bytes: bool,
) -> Tensor:
    count, pixels = _check(logits, choice, uniform, channels), logits.shape[2] * logits.shape[3]
    shape, dtype = _new(logits, channels, as_bytes)
    image = torch.empty(shape, dtype=dtype, device=logits.device)
    grid = (-(-pixels // PIXELS), len(logits))
    known = {
        "logits": logits.contiguous(), "image": image, "numbers": logits.shape[1], "count": count, "pixels": pixels,
        "CHANNELS": channels, "AS_BYTES": as_bytes, "PIXELS": PIXELS,
    }  # fmt: skip
    if choice is None or uniform is None or levels is None:
        launch(_mean_kernel, grid, 4, **known)
    else:
        drawn = {"choice": choice.contiguous(), "uniform": uniform.contiguous(), "levels": levels}
        launch(_draw_kernel, grid, 4, **known, **drawn, LEVELS=LEVELS)
    return image


# -- the operator: Triton on CUDA, plain torch on the CPU

_image = operator("mixture_image", _image_triton, _image_aten)


@_image.register_fake
def _(
    logits: Tensor,
    choice: Tensor | None,
    uniform: Tensor | None,
    levels: Tensor | None,
    channels: int,
    as_bytes: bool,
) -> Tensor:
    _check(logits, choice, uniform, channels)
    shape, dtype = _new(logits, channels, as_bytes)
    return logits.new_empty(shape, dtype=dtype)
