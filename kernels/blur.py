"""2x resampling with the binomial kernel (1, 3, 3, 1) / 8 per axis (hflow spec 2.6): each one read and one write.

On CUDA a lane owns one output column and walks down the rows. What it has filtered along the row it keeps for the
next rows, so that the loop loads each input row once and the caches only serve neighbours in the row. Going down and
the gradient of going up have one shape, two samples to one, and going up and the gradient of going down the other;
`ADJOINT` picks the edges. Sums are float32 whatever the type of the tensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.dispatch import jit, launch, operator, round_up, takes, tl
from hflow_rt.kernels.moments import EPSILON, gather_moments, moments_reference, new_parts, pooled, statistics_dtype

__all__ = [
    "blur_down",
    "blur_down_moments",
    "blur_down_reference",
    "blur_up",
    "blur_up_moments",
    "blur_up_reference",
]


def blur_down(x: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, C, H/2, W/2]`: out[m] = (x[2m-1] + 3 x[2m] + 3 x[2m+1] + x[2m+2]) / 8, reflected ends.

    H and W must be at least 2. Where one is odd, its half is rounded down.
    """
    return _down(x, False)[0] if takes(x) else blur_down_reference(x)


def blur_up(x: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, C, 2H, 2W]`: out[2m] = (x[m-1] + 3 x[m]) / 4, out[2m+1] = (3 x[m] + x[m+1]) / 4.

    The first sample is repeated before the start and the last but one reflected past the end. H and W must be at
    least 2.
    """
    return _up(x, False)[0] if takes(x) else blur_up_reference(x)


def blur_down_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """`blur_down`, and the moments `[B, C, 2]` of its result that an instance norm after it would have to read it for.

    No gradient flows through the moments; that of `instance_norm_act` accounts for them.
    """
    return _down(x, True) if takes(x) else _down_aten(x, True)


def blur_up_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """`blur_up` and the moments `[B, C, 2]` of its result; see `blur_down_moments`."""
    return _up(x, True) if takes(x) else _up_aten(x, True)


# -- plain torch


def blur_down_reference(x: Tensor) -> Tensor:
    """`blur_down` in plain torch: a depthwise convolution."""
    channels = x.shape[1]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    weight = (taps[:, None] * taps[None, :]).expand(channels, 1, 4, 4)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, stride=2, groups=channels)


def blur_up_reference(x: Tensor) -> Tensor:
    """`blur_up` in plain torch: half-pixel bilinear interpolation but for the last row and column.

    Hence one reflected row and column, and a crop.
    """
    padded = F.pad(x, (0, 1, 0, 1), mode="reflect")
    return F.interpolate(padded, scale_factor=2, mode="bilinear", align_corners=False)[..., :-2, :-2]


def _down_line_adjoint(g: Tensor, n: int) -> Tensor:
    """Transpose of `blur_down` along the last axis, of `n` samples before the blur."""
    m = n // 2
    x = g.new_zeros(*g.shape[:-1], n)
    x[..., 0 : 2 * m : 2] += 3 * g
    x[..., 1 : 2 * m : 2] += 3 * g
    x[..., 1 : 2 * m - 2 : 2] += g[..., 1:]
    x[..., 2::2] += g[..., : (n - 1) // 2]
    x[..., 1] += g[..., 0]
    if n % 2 == 0:
        x[..., n - 2] += g[..., -1]
    return x / 8


def _up_line_adjoint(g: Tensor) -> Tensor:
    """Transpose of `blur_up` along the last axis."""
    even, odd = g[..., 0::2], g[..., 1::2]
    x = 3 * (even + odd)
    x[..., :-1] += even[..., 1:]
    x[..., 1:] += odd[..., :-1]
    x[..., 0] += even[..., 0]
    x[..., -2] += odd[..., -1]
    return x / 4


def _down_aten(x: Tensor, emit: bool) -> tuple[Tensor, Tensor]:
    y = blur_down_reference(x).contiguous()
    return y, moments_reference(y.detach()) if emit else x.new_empty(0, dtype=statistics_dtype(x))


def _up_aten(x: Tensor, emit: bool) -> tuple[Tensor, Tensor]:
    y = blur_up_reference(x).contiguous()
    return y, moments_reference(y.detach()) if emit else x.new_empty(0, dtype=statistics_dtype(x))


def _down_adjoint_aten(g: Tensor, height: int, width: int) -> Tensor:
    wide = g.to(statistics_dtype(g))
    rows = _down_line_adjoint(wide.transpose(2, 3), height).transpose(2, 3)
    return _down_line_adjoint(rows, width).to(g.dtype).contiguous()


def _up_adjoint_aten(g: Tensor) -> Tensor:
    wide = g.to(statistics_dtype(g))
    rows = _up_line_adjoint(wide.transpose(2, 3)).transpose(2, 3)
    return _up_line_adjoint(rows).to(g.dtype).contiguous()


# -- kernels


@jit
def _plane(x, plane, channels, step_b, step_c):
    """Where planes start; in int64, because a tensor may hold more than 2^31 numbers."""
    return x + (plane // channels).to(tl.int64) * step_b + (plane % channels).to(tl.int64) * step_c


@jit
def _welford(value, count, mean, squares):
    """One more value, the `count`-th, in every lane."""
    off = value - mean
    mean += off / count
    return mean, squares + off * (value - mean)


@jit
def _emit(out, plane0, planes, many, count, mean, squares, EPS: tl.constexpr, PLANES: tl.constexpr):
    """Pool the lanes of a tile. A tile that is all there is of its planes writes the moments themselves."""
    count, mean, squares = pooled(count, mean, squares, 1)
    plane = plane0 + tl.arange(0, PLANES)
    inside = plane < planes
    if many == 1:
        at = out + plane.to(tl.int64) * 2
        tl.store(at, mean, inside)
        tl.store(at + 1, 1.0 / tl.sqrt(squares / tl.maximum(count - 1.0, 1.0) + EPS), inside)
    else:
        part = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        at = out + (plane.to(tl.int64) * many + part) * 3
        tl.store(at, count, inside)
        tl.store(at + 1, mean, inside)
        tl.store(at + 2, squares, inside)


@jit
def _halved_row(base, row, height, width, step_h, step_w, column, inside, ADJOINT: tl.constexpr):
    """Taps 1, 3, 3, 1 along input row `row` around output columns `column`."""
    if ADJOINT:  # of going up: the first is repeated, past the end is nothing, the last also went to the last but one
        inside = inside & (column < tl.where(row < height, width, 0))
        row = tl.maximum(row, 0)
    else:
        row = tl.where(row < 0, -row, tl.where(row >= height, 2 * height - 2 - row, row))
    line = base + row * step_h
    if ADJOINT:
        before = tl.load(line + tl.maximum(2 * column - 1, 0) * step_w, inside, 0.0).to(tl.float32)
        after = tl.load(line + (2 * column + 2) * step_w, inside & (2 * column + 2 < width), 0.0).to(tl.float32)
        after += tl.load(line + (width - 1) * step_w + 0 * column, inside & (2 * column + 4 == width), 0.0).to(
            tl.float32
        )
    else:
        before = tl.load(line + tl.where(column == 0, 1, 2 * column - 1) * step_w, inside, 0.0).to(tl.float32)
        reflected = tl.where(2 * column + 2 == width, width - 2, 2 * column + 2)
        after = tl.load(line + reflected * step_w, inside, 0.0).to(tl.float32)
    left = tl.load(line + 2 * column * step_w, inside, 0.0).to(tl.float32)
    right = tl.load(line + (2 * column + 1) * step_w, inside, 0.0).to(tl.float32)
    return before + 3.0 * (left + right) + after


@jit
def _halve(
    x, y, emitted, planes, channels, height, width, step_b, step_c, step_h, step_w, many,
    ADJOINT: tl.constexpr, EMIT: tl.constexpr, EPS: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Two samples to one along both axes: `blur_down`, or the gradient of `blur_up`."""
    rows, columns = height // 2, width // 2
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (plane < planes) & (column < columns)
    base = _plane(x, plane, channels, step_b, step_c)
    out = y + plane.to(tl.int64) * rows * columns + column
    first = tl.program_id(1) * ROWS
    last = tl.minimum(first + ROWS, rows)
    scale = 1.0 / 16.0 if ADJOINT else 1.0 / 64.0
    mean = tl.zeros((PLANES, COLUMNS), tl.float32)
    squares = tl.zeros((PLANES, COLUMNS), tl.float32)
    above = _halved_row(base, 2 * first - 1, height, width, step_h, step_w, column, inside, ADJOINT)
    upper = _halved_row(base, 2 * first, height, width, step_h, step_w, column, inside, ADJOINT)
    for row in range(first, last):
        lower = _halved_row(base, 2 * row + 1, height, width, step_h, step_w, column, inside, ADJOINT)
        below = _halved_row(base, 2 * row + 2, height, width, step_h, step_w, column, inside, ADJOINT)
        value = above + 3.0 * (upper + lower) + below
        if ADJOINT:  # the last row reached the last but one; elsewhere nothing is read. A branch here made ptxas spill
            extra = tl.where(row == rows - 2, height - 1, height)
            value += _halved_row(base, extra, height, width, step_h, step_w, column, inside, ADJOINT)
        value = (value * scale).to(y.dtype.element_ty)
        tl.store(out + row * columns, value, inside)
        if EMIT:
            mean, squares = _welford(value.to(tl.float32), (row - first + 1) * 1.0, mean, squares)
        above = lower
        upper = below
    if EMIT:
        count = tl.where(inside, (last - first) * 1.0, 0.0)
        _emit(emitted, tl.program_id(0) * PLANES, planes, many, count, mean, squares, EPS, PLANES)


@jit
def _doubled_row(base, row, height, width, step_h, step_w, near, far, weight, inside, ADJOINT: tl.constexpr):
    """`weight` times the nearer sample plus the farther one, along input row `row`."""
    if ADJOINT:  # of going down: nothing outside
        end = tl.where((row >= 0) & (row < height), width, 0)
        has_near = inside & (near < end)
        has_far = inside & (far >= 0) & (far < end)
        row = tl.maximum(row, 0)
    else:
        has_near = inside
        has_far = inside
        row = tl.where(row < 0, 0, tl.where(row >= height, height - 2, row))
    line = base + row * step_h
    nearer = tl.load(line + near * step_w, has_near, 0.0).to(tl.float32)
    return weight * nearer + tl.load(line + far * step_w, has_far, 0.0).to(tl.float32)


@jit
def _double(
    x, y, emitted, planes, channels, height, width, rows, columns, step_b, step_c, step_h, step_w, many,
    ADJOINT: tl.constexpr, EMIT: tl.constexpr, EPS: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One sample to two along both axes: `blur_up`, or the gradient of `blur_down`, whose result may be odd."""
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (plane < planes) & (column < columns)
    base = _plane(x, plane, channels, step_b, step_c)
    out = y + plane.to(tl.int64) * rows * columns + column
    near = column // 2
    far = near + 2 * (column % 2) - 1
    if ADJOINT:  # a reflected sample also received what its mirror image should have
        reflected = (column == 1) | ((column % 2 == 0) & (column == columns - 2))
        weight = tl.where(reflected, 4.0, 3.0)
    else:
        far = tl.where(far < 0, 0, tl.where(far >= width, width - 2, far))
        weight = 3.0
    first = tl.program_id(1) * ROWS
    last = tl.minimum(first + ROWS, (rows + 1) // 2)
    scale = 1.0 / 64.0 if ADJOINT else 1.0 / 16.0
    mean = tl.zeros((PLANES, COLUMNS), tl.float32)
    squares = tl.zeros((PLANES, COLUMNS), tl.float32)
    above = _doubled_row(base, first - 1, height, width, step_h, step_w, near, far, weight, inside, ADJOINT)
    here = _doubled_row(base, first, height, width, step_h, step_w, near, far, weight, inside, ADJOINT)
    for row in range(first, last):
        below = _doubled_row(base, row + 1, height, width, step_h, step_w, near, far, weight, inside, ADJOINT)
        upper = above + 3.0 * here
        lower = below + 3.0 * here
        if ADJOINT:
            upper += tl.where(2 * row == rows - 2, 1.0, 0.0) * here
            lower += tl.where(row == 0, 1.0, 0.0) * here
        upper = (upper * scale).to(y.dtype.element_ty)
        lower = (lower * scale).to(y.dtype.element_ty)
        tl.store(out + 2 * row * columns, upper, inside)
        tl.store(out + (2 * row + 1) * columns, lower, inside & (column < tl.where(2 * row + 1 < rows, columns, 0)))
        if EMIT:
            seen = 2.0 * (row - first)
            mean, squares = _welford(upper.to(tl.float32), seen + 1.0, mean, squares)
            mean, squares = _welford(lower.to(tl.float32), seen + 2.0, mean, squares)
        above = here
        here = below
    if EMIT:
        count = tl.where(inside, (last - first) * 2.0, 0.0)
        _emit(emitted, tl.program_id(0) * PLANES, planes, many, count, mean, squares, EPS, PLANES)


# -- host

LANES = 256  # columns a program walks at once, of one plane or several: two a thread of four warps; four spilled
DEPTH = 16  # steps a program walks down: two rows loaded again out of 32, and enough programs at batch 1


def _launch(kernel: Any, x: Tensor, y: Tensor, steps: int, emit: bool, **arguments: Any) -> Tensor:
    """Walk the planes of `y` in `steps` steps of one or two rows. Returns the moments, or nothing of them."""
    batch, channels, height, width = x.shape
    planes = batch * channels
    columns = min(LANES, round_up(y.shape[3]))
    side = max(1, min(LANES // columns, round_up(planes)))
    grid = (-(-planes // side), -(-steps // DEPTH), -(-y.shape[3] // columns))
    many = grid[1] * grid[2]
    moments = torch.empty((batch, channels, 2) if emit else 0, dtype=torch.float32, device=x.device)
    parts = new_parts(x, many) if emit and many > 1 else moments
    step_b, step_c, step_h, step_w = x.stride()
    launch(
        kernel, grid, max(1, min(4, side * columns // 64)),
        x=x, y=y, emitted=parts, planes=planes, channels=channels, height=height, width=width,
        step_b=step_b, step_c=step_c, step_h=step_h, step_w=step_w, many=many,
        EMIT=emit, EPS=EPSILON, PLANES=side, ROWS=DEPTH, COLUMNS=columns, **arguments,
    )  # fmt: skip
    return gather_moments(parts, batch, channels) if emit and many > 1 else moments


def _down_triton(x: Tensor, emit: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty(_half(x), dtype=x.dtype, device=x.device)
    return y, _launch(_halve, x, y, y.shape[2], emit, ADJOINT=False)


def _up_adjoint_triton(g: Tensor) -> Tensor:
    x = torch.empty(_half(g), dtype=g.dtype, device=g.device)
    _launch(_halve, g, x, x.shape[2], False, ADJOINT=True)
    return x


def _up_triton(x: Tensor, emit: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty(_twice(x), dtype=x.dtype, device=x.device)
    return y, _launch(_double, x, y, x.shape[2], emit, rows=y.shape[2], columns=y.shape[3], ADJOINT=False)


def _down_adjoint_triton(g: Tensor, height: int, width: int) -> Tensor:
    x = torch.empty(*g.shape[:2], height, width, dtype=g.dtype, device=g.device)
    _launch(_double, g, x, (height + 1) // 2, False, rows=height, columns=width, ADJOINT=True)
    return x


def _half(x: Tensor) -> list[int]:
    _at_least_two(x)
    return [*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2]


def _twice(x: Tensor) -> list[int]:
    _at_least_two(x)
    return [*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]]


def _at_least_two(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[2] < 2 or x.shape[3] < 2:
        raise ValueError(f"a blur needs [B, C, H, W] with sides of at least 2, not {list(x.shape)}")


# -- operators: Triton on CUDA, plain torch on the CPU; each pair is the other's gradient

_down = operator("blur_down", _down_triton, _down_aten)
_down_adjoint = operator("blur_down_adjoint", _down_adjoint_triton, _down_adjoint_aten, gradient_of="blur_down")
_up = operator("blur_up", _up_triton, _up_aten)
_up_adjoint = operator("blur_up_adjoint", _up_adjoint_triton, _up_adjoint_aten, gradient_of="blur_up")


@_down.register_fake
def _(x: Tensor, emit: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(_half(x)), x.new_empty((*x.shape[:2], 2) if emit else 0, dtype=statistics_dtype(x))


@_up.register_fake
def _(x: Tensor, emit: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(_twice(x)), x.new_empty((*x.shape[:2], 2) if emit else 0, dtype=statistics_dtype(x))


@_down_adjoint.register_fake
def _(g: Tensor, height: int, width: int) -> Tensor:
    return g.new_empty(*g.shape[:2], height, width)


@_up_adjoint.register_fake
def _(g: Tensor) -> Tensor:
    return g.new_empty(_half(g))


def _remember_size(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.size = inputs[0].shape[2:]
    ctx.mark_non_differentiable(output[1])


def _differentiate_down(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return _down_adjoint(g, *ctx.size), None


def _differentiate_up(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return _up_adjoint(g), None


_down.register_autograd(_differentiate_down, setup_context=_remember_size)
_up.register_autograd(_differentiate_up, setup_context=_remember_size)
_down_adjoint.register_autograd(lambda ctx, x: (_down(x, False)[0], None, None))
_up_adjoint.register_autograd(lambda ctx, x: _up(x, False)[0])
