"""The coupling's Triton kernels: see `coupling_forms` for what they compute, and `channels` for who owns what."""

from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels.channels import (
    flat,
    gathered,
    held,
    lanes,
    mapped,
    outer,
    pixels_at,
    room,
    steps,
)
from hflow_rt.kernels.coupling_forms import LOG_SCALE_BOUND, SHIFT_BOUND, Region
from hflow_rt.kernels.dispatch import jit, launch, tl

__all__ = ["couple", "couple_backward"]


@jit
def _net_terms(r, t, FORM: tl.constexpr, INVERSE: tl.constexpr, BOUND: tl.constexpr, SHIFT: tl.constexpr):
    """e^s (where `INVERSE` e^-s), b and s. Comparisons, for `tl.clamp` would turn what is no number into a bound."""
    if FORM == "clipped":
        s = tl.where(r > BOUND, BOUND, tl.where(r < -BOUND, -BOUND, r))
        b = tl.where(t > SHIFT, SHIFT, tl.where(t < -SHIFT, -SHIFT, t))
        factor = tl.exp(-s if INVERSE else s)
    else:
        b = -t
        decay = tl.exp(-tl.abs(r + 2.0))
        sigmoid = tl.where(r + 2.0 < 0.0, decay, 1.0) / (1.0 + decay)
        if FORM == "sigmoid":
            s = tl.log(1.0 + decay) - tl.where(r + 2.0 < 0.0, r + 2.0, 0.0)
            factor = sigmoid if INVERSE else 1.0 + tl.exp(-2.0 - r)
        else:
            s = -sigmoid
            factor = tl.exp(-s if INVERSE else s)
    return factor, b, s


@jit
def _net_slopes(r, t, FORM: tl.constexpr, BOUND: tl.constexpr, SHIFT: tl.constexpr):
    """Derivatives of s by r and of b by t."""
    if FORM == "clipped":
        by_s = tl.where(tl.abs(r) <= BOUND, 1.0, 0.0)
        by_b = tl.where(tl.abs(t) <= SHIFT, 1.0, 0.0)
    else:
        by_b = -1.0
        decay = tl.exp(-tl.abs(r + 2.0))
        by_s = -tl.where(r + 2.0 < 0.0, 1.0, decay) / (1.0 + decay)
        if FORM == "exp_sigmoid":
            by_s = by_s * (1.0 + by_s)
    return by_s, by_b


@jit
def _cells(pixel, inside, parity, CELL_H: tl.constexpr, CELL_W: tl.constexpr, WIDTH: tl.constexpr):
    """Which pixels are transformed, and for which the net is read: all where cells are small, as it is four at once."""
    cells = inside
    read = inside
    if CELL_H > 0:
        cells = inside & (((pixel // WIDTH) // CELL_H + (pixel % WIDTH) // CELL_W) % 2 == parity)
        if CELL_W % 8 == 0 and WIDTH % 8 == 0:  # whole sectors of memory
            read = tl.max_constancy(cells, [4])
    return cells, read


@jit
def _coupled(
    x, log_scale, shift, batch, c, pixel, inside, cells, read, x_b, x_c, x_p, scale_b, scale_c, scale_p,
    shift_b, shift_c, shift_p, FORM: tl.constexpr, INVERSE: tl.constexpr, BOUND: tl.constexpr, SHIFT: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One channel, coupled, and its s."""
    channel = c + 0 * pixel
    where = cells & (channel >= LOW) & (channel < HIGH)
    read = read & (channel >= LOW) & (channel < HIGH)
    value = tl.load(pixels_at(x, batch, c, pixel, x_b, x_c, x_p), inside, 0.0)
    t = tl.load(pixels_at(shift, batch, c - FIRST, pixel, shift_b, shift_c, shift_p), read, 0.0).to(tl.float32)
    if FORM == "additive":
        moved = value + t if INVERSE else value - t
        s = 0.0
    else:
        r = tl.load(pixels_at(log_scale, batch, c - FIRST, pixel, scale_b, scale_c, scale_p), read, 0.0)
        factor, b, s = _net_terms(r.to(tl.float32), t, FORM, INVERSE, BOUND, SHIFT)
        moved = (value - b) * factor if INVERSE else value * factor + b
    return tl.where(where, moved, value), tl.where(where, s, 0.0)


@jit
def _leave(
    out, value, post_shift, post_log_scale, batch, c, pixel, inside, pixels,
    post_b, post_c, post_p, log_b, log_c, log_p, INVERSE: tl.constexpr,
):  # fmt: skip
    """Store one channel of the result."""
    if post_shift is not None:
        shift = tl.load(pixels_at(post_shift, batch, c, pixel, post_b, post_c, post_p), inside, 0.0).to(tl.float32)
        log_scale = tl.load(pixels_at(post_log_scale, batch, c, pixel, log_b, log_c, log_p), inside, 0.0)
        value = outer(value, shift, log_scale.to(tl.float32), INVERSE)
    tl.store(out + c * pixels, value, inside)


@jit
def _couple(
    x, y, parts, log_scale, shift, weight, bias, post_shift, post_log_scale, pixels, channels, parity,
    x_b, x_c, x_p, scale_b, scale_c, scale_p, shift_b, shift_c, shift_p, post_b, post_c, post_p, log_b, log_c, log_p,
    FORM: tl.constexpr, INVERSE: tl.constexpr, BOUND: tl.constexpr, SHIFT: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FIRST: tl.constexpr,
    CELL_H: tl.constexpr, CELL_W: tl.constexpr, WIDTH: tl.constexpr,
    FULL: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    cells, read = _cells(pixel, inside, parity, CELL_H, CELL_W, WIDTH)
    out = y + batch.to(tl.int64) * channels * pixels + pixel
    if FULL:
        total = tl.zeros((PIXELS,), tl.float32)
        values = ()
        for c in tl.static_range(C):
            value, s = _coupled(
                x, log_scale, shift, batch, c, pixel, inside, cells, read, x_b, x_c, x_p, scale_b, scale_c, scale_p,
                shift_b, shift_c, shift_p, FORM, INVERSE, BOUND, SHIFT, LOW, HIGH, FIRST,
            )  # fmt: skip
            values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005 - Triton adds tuples and unpacks none
            total += s
        for o in tl.static_range(C):
            result = mapped(values, weight + o * C, 1, C)
            if bias is not None:
                result += tl.load(bias + o)
            _leave(
                out, result, post_shift, post_log_scale, batch, o, pixel, inside, pixels,
                post_b, post_c, post_p, log_b, log_c, log_p, INVERSE,
            )  # fmt: skip
    else:
        c = tl.program_id(2)
        value, total = _coupled(
            x, log_scale, shift, batch, c, pixel, inside, cells, read, x_b, x_c, x_p, scale_b, scale_c, scale_p,
            shift_b, shift_c, shift_p, FORM, INVERSE, BOUND, SHIFT, LOW, HIGH, FIRST,
        )  # fmt: skip
        if weight is not None:
            value = value * tl.load(weight + c)
        if bias is not None:
            value += tl.load(bias + c)
        _leave(
            out, value, post_shift, post_log_scale, batch, c, pixel, inside, pixels,
            post_b, post_c, post_p, log_b, log_c, log_p, INVERSE,
        )  # fmt: skip
    if FORM != "additive":
        part = (batch.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        tl.store(parts + part, tl.sum(-total if INVERSE else total, 0))


@jit
def _unleave(
    g, y, d_post_shift, d_post_log_scale, post_shift, post_log_scale, batch, c, pixel, inside, pixels, channels,
    g_b, g_c, g_p, y_b, y_c, y_p, post_b, post_c, post_p, log_b, log_c, log_p, INVERSE: tl.constexpr,
):  # fmt: skip
    """One channel before `post`, and the gradient by it; those by `post` are stored."""
    above = tl.load(pixels_at(g, batch, c, pixel, g_b, g_c, g_p), inside, 0.0)
    value = tl.load(pixels_at(y, batch, c, pixel, y_b, y_c, y_p), inside, 0.0)
    if post_shift is not None:
        shift = tl.load(pixels_at(post_shift, batch, c, pixel, post_b, post_c, post_p), inside, 0.0).to(tl.float32)
        log_scale = tl.load(pixels_at(post_log_scale, batch, c, pixel, log_b, log_c, log_p), inside, 0.0)
        log_scale = log_scale.to(tl.float32)
        at = (batch.to(tl.int64) * channels + c) * pixels + pixel
        if INVERSE:
            by_log_scale = -above * value
            above = above * tl.exp(-log_scale)
            by_shift = -above
        else:
            by_log_scale = above * (value - shift)
            by_shift = above
            above = above * tl.exp(log_scale)
        value = outer(value, shift, log_scale, not INVERSE)
        tl.store(d_post_shift + at, by_shift.to(d_post_shift.dtype.element_ty), inside)
        tl.store(d_post_log_scale + at, by_log_scale.to(d_post_log_scale.dtype.element_ty), inside)
    return value, above


@jit
def _uncouple(
    d_x, d_log_scale, d_shift, u, above, total, log_scale, shift, batch, c, pixel, inside, cells, read,
    pixels, channels, scale_b, scale_c, scale_p, shift_b, shift_c, shift_p,
    FORM: tl.constexpr, INVERSE: tl.constexpr, BOUND: tl.constexpr, SHIFT: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FIRST: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Store one channel's gradients by input and net, from the coupled `u` and the gradient `above` by it."""
    channel = c + 0 * pixel
    where = cells & (channel >= LOW) & (channel < HIGH)
    read = read & (channel >= LOW) & (channel < HIGH)
    at = (batch.to(tl.int64) * channels + c) * pixels + pixel
    net_at = (batch.to(tl.int64) * GIVEN + c - FIRST) * pixels + pixel
    given = inside & (channel >= FIRST) & (channel < FIRST + GIVEN)
    if FORM == "additive":
        by_x = above
        by_t = above if INVERSE else -above
    else:
        t = tl.load(pixels_at(shift, batch, c - FIRST, pixel, shift_b, shift_c, shift_p), read, 0.0).to(tl.float32)
        r = tl.load(pixels_at(log_scale, batch, c - FIRST, pixel, scale_b, scale_c, scale_p), read, 0.0)
        r = r.to(tl.float32)
        factor, b, _ = _net_terms(r, t, FORM, INVERSE, BOUND, SHIFT)
        by_s, by_b = _net_slopes(r, t, FORM, BOUND, SHIFT)
        by_x = above * factor
        if INVERSE:
            by_t = -by_x * by_b
            by_r = -(above * u + total) * by_s
        else:
            by_t = above * by_b
            by_r = (above * (u - b) + total) * by_s
        tl.store(d_log_scale + net_at, tl.where(where, by_r, 0.0).to(d_log_scale.dtype.element_ty), given)
    tl.store(d_shift + net_at, tl.where(where, by_t, 0.0).to(d_shift.dtype.element_ty), given)
    tl.store(d_x + at, tl.where(where, by_x, above), inside)


@jit
def _couple_gradient(
    g, g_log_det, y, d_x, d_log_scale, d_shift, d_post_shift, d_post_log_scale, parts,
    log_scale, shift, weight, undo, bias, post_shift, post_log_scale, pixels, channels, parity,
    g_b, g_c, g_p, y_b, y_c, y_p, scale_b, scale_c, scale_p, shift_b, shift_c, shift_p,
    post_b, post_c, post_p, log_b, log_c, log_p,
    FORM: tl.constexpr, INVERSE: tl.constexpr, BOUND: tl.constexpr, SHIFT: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FIRST: tl.constexpr, GIVEN: tl.constexpr,
    CELL_H: tl.constexpr, CELL_W: tl.constexpr, WIDTH: tl.constexpr,
    FULL: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Gradients of `_couple` from its result; of the channel map, this program's part of the sums."""
    batch = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    cells, read = _cells(pixel, inside, parity, CELL_H, CELL_W, WIDTH)
    part = batch.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    total = tl.load(g_log_det + batch)
    if FULL:
        part = parts + part * (C * C + C)
        results = ()
        aboves = ()
        for o in tl.static_range(C):
            result, above = _unleave(
                g, y, d_post_shift, d_post_log_scale, post_shift, post_log_scale, batch, o, pixel, inside, pixels,
                channels, g_b, g_c, g_p, y_b, y_c, y_p, post_b, post_c, post_p, log_b, log_c, log_p, INVERSE,
            )  # fmt: skip
            if bias is not None:
                result -= tl.load(bias + o)
                tl.store(part + C * C + o, tl.sum(above, 0))
            results = results + (result,)  # type: ignore[assignment]  # noqa: RUF005
            aboves = aboves + (above,)  # type: ignore[assignment]  # noqa: RUF005
        for c in tl.static_range(C):
            u = mapped(results, undo + c * C, 1, C)
            for o in tl.static_range(C):
                tl.store(part + o * C + c, tl.sum(aboves[o] * u, 0))
            _uncouple(
                d_x, d_log_scale, d_shift, u, mapped(aboves, weight + c, C, C), total, log_scale, shift,
                batch, c, pixel, inside, cells, read, pixels, channels, scale_b, scale_c, scale_p,
                shift_b, shift_c, shift_p, FORM, INVERSE, BOUND, SHIFT, LOW, HIGH, FIRST, GIVEN,
            )  # fmt: skip
    else:
        c = tl.program_id(2)
        u, above = _unleave(
            g, y, d_post_shift, d_post_log_scale, post_shift, post_log_scale, batch, c, pixel, inside, pixels,
            channels, g_b, g_c, g_p, y_b, y_c, y_p, post_b, post_c, post_p, log_b, log_c, log_p, INVERSE,
        )  # fmt: skip
        if bias is not None:
            u -= tl.load(bias + c)
        if weight is not None:
            part = parts + part * channels * 2
            u = u * tl.load(undo + c)
            tl.store(part + c, tl.sum(above * u, 0))
            tl.store(part + channels + c, tl.sum(above, 0))
            above = above * tl.load(weight + c)
        _uncouple(
            d_x, d_log_scale, d_shift, u, above, total, log_scale, shift,
            batch, c, pixel, inside, cells, read, pixels, channels, scale_b, scale_c, scale_p,
            shift_b, shift_c, shift_p, FORM, INVERSE, BOUND, SHIFT, LOW, HIGH, FIRST, GIVEN,
        )  # fmt: skip


# -- host

LANES = 512  # pixels of a program
LANES_BACKWARD = 128  # those of one warp, so that its many sums need no other


def _settings(x: Tensor, shift: Tensor, region: Region, inverse: bool, form: str) -> dict[str, Any]:
    """What both kernels are told of the region and the form."""
    width = x.shape[3] if region.cell_height else 1
    return {
        "parity": region.parity, "FORM": form, "INVERSE": inverse, "BOUND": LOG_SCALE_BOUND, "SHIFT": SHIFT_BOUND,
        "LOW": region.low, "HIGH": region.high, "FIRST": region.first(shift),
        "CELL_H": region.cell_height, "CELL_W": region.cell_width, "WIDTH": width,
    }  # fmt: skip


def couple(
    x: Tensor, log_scale: Tensor | None, shift: Tensor, weight: Tensor | None, bias: Tensor | None,
    undo: Tensor | None, post_shift: Tensor | None, post_log_scale: Tensor | None,
    region: list[int], inverse: bool, form: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`coupling`, launched."""
    x, log_scale, shift = flat(x), flat(log_scale), flat(shift)
    post_shift, post_log_scale = flat(post_shift), flat(post_log_scale)
    grid, warps, sizes = lanes(x, weight is not None and weight.dim() == 2, LANES, 8)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    additive = log_scale is None
    parts = None if additive else torch.empty(len(x), grid[1] * grid[2], dtype=torch.float32, device=x.device)
    launch(
        _couple, grid, warps, x=x, y=y, parts=parts, log_scale=log_scale, shift=shift, weight=held(weight),
        bias=held(bias), post_shift=post_shift, post_log_scale=post_log_scale, **steps(x, "x"),
        **steps(log_scale, "scale"), **steps(shift, "shift"), **steps(post_shift, "post"),
        **steps(post_log_scale, "log"), **_settings(x, shift, Region(*region), inverse, form), **sizes,
    )  # fmt: skip
    return y, x.new_zeros(len(x)) if parts is None else parts.sum(1)


def couple_backward(
    g: Tensor, g_log_det: Tensor, y: Tensor, log_scale: Tensor | None, shift: Tensor,
    weight: Tensor | None, bias: Tensor | None, undo: Tensor | None,
    post_shift: Tensor | None, post_log_scale: Tensor | None, region: list[int], inverse: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`gradients_from_result`, launched."""
    g, y, log_scale, shift = flat(g), flat(y), flat(log_scale), flat(shift)
    post_shift, post_log_scale = flat(post_shift), flat(post_log_scale)
    grid, warps, sizes = lanes(y, weight is not None and weight.dim() == 2, LANES_BACKWARD, 4)
    made = {
        "d_x": room(y, y), "d_log_scale": room(log_scale, y), "d_shift": room(shift, y),
        "d_post_shift": room(post_shift, y), "d_post_log_scale": room(post_log_scale, y),
    }  # fmt: skip
    sums = 0 if weight is None else weight.numel() + y.shape[1]
    parts = torch.empty(grid[0] * grid[1], sums, dtype=torch.float32, device=y.device)
    launch(
        _couple_gradient, grid, warps, g=g, g_log_det=g_log_det.contiguous(), y=y, **made, parts=parts,
        log_scale=log_scale, shift=shift, weight=held(weight), undo=held(undo), bias=held(bias),
        post_shift=post_shift, post_log_scale=post_log_scale,
        **steps(g, "g"), **steps(y, "y"), **steps(log_scale, "scale"), **steps(shift, "shift"),
        **steps(post_shift, "post"), **steps(post_log_scale, "log"),
        **_settings(y, shift, Region(*region), inverse, form), GIVEN=shift.shape[1], **sizes,
    )  # fmt: skip
    d_weight, d_bias = gathered(parts, weight, bias)
    d_x, d_log_scale, d_shift, d_post_shift, d_post_log_scale = made.values()
    return d_x, d_log_scale, d_shift, d_weight, d_bias, d_post_shift, d_post_log_scale
