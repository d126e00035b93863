"""As `proof_inputs`, of the operators of a generator that makes its weights for each image."""

from typing import Any

import torch

from hflow_rt.kernels.proof_inputs import BRAIN, HALF, Case, Draw

__all__ = ["acts", "modulations", "rounded", "splits"]


def acts() -> tuple[Case, ...]:
    """With a clamp, without a bias, and of a side that 16 divides."""

    def case(dtype: torch.dtype, size: tuple[int, ...], clamp: float | None = None, bias: bool = True) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            return draw(*size, dtype=dtype), draw(size[1]) if bias else None, 0.2, 1.5, clamp

        return Case(f"{_name(dtype)} {list(size)}{' clamped' if clamp else ''}", inputs)

    return (
        case(torch.float32, (3, 5, 9, 121), clamp=1.0),
        case(HALF, (2, 3, 5, 7), bias=False),
        case(BRAIN, (2, 16, 16, 16)),
    )


def splits() -> tuple[Case, ...]:
    """Planes that are cut in parts, the smallest that there are, and of a side that 16 divides."""

    def case(dtype: torch.dtype, size: tuple[int, int, int], mode: str) -> Case:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            batch, channels, side = size
            high, low = draw(batch, channels, 2 * side, 2 * side), draw(batch, channels, side, side)
            return high.to(dtype), low.to(dtype), draw(channels), mode, 1.4

        return Case(f"{mode}, {_name(dtype)} {list(size)}", inputs)

    return (
        case(torch.float32, (1, 2, 17), "bilinear"),
        case(HALF, (3, 5, 2), "bilinear"),
        case(BRAIN, (2, 4, 8), "nearest"),
    )


def modulations() -> tuple[Case, ...]:
    """With factors of columns and without."""

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


def rounded() -> tuple[Case, ...]:
    """Of numbers whose product with 255 float32 holds, so that half a level is half a level."""

    def case(dtype: torch.dtype, size: tuple[int, ...]) -> Case:
        return Case(
            f"{_name(dtype)} {list(size)}",
            lambda draw: (((0.5 + draw(*size)).mul(1024).round() / 1024).to(dtype),),
        )

    return case(torch.float32, (2, 3, 35, 33)), case(HALF, (1, 1, 5, 7)), case(BRAIN, (2, 3, 16, 16))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
