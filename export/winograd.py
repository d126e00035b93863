"""Wide 3x3 convolutions with fewer multiplications, for CPUs (Winograd's minimal filtering; Lavin and Gray 2016).

A tile of m x m outputs of a 3x3 convolution takes (m + 2)^2 products instead of 9 m^2: 2.25 times fewer for m = 2,
4 times for m = 4. The graph then holds, for each such convolution, `Y = A^T [(G W G^T) (B^T X B)] A`:

    X -> B^T X B        a convolution with (m + 2)^2 fixed outputs a channel
    (...) (...)         a matrix product over channels, one for each of the (m + 2)^2 places in a tile
    A^T [...] A         one more matrix product, and a rearrangement of tiles into an image

What is exact in exact arithmetic rounds differently: parity decides whether an engine may use it, as always.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hflow_rt.export.rewriting import Rewrite, View, activation, attributes

__all__ = ["minimal_filter", "winograd"]

Array = NDArray[np.float64]
_TAPS = 3
_MARGIN = 1.25  # it rounds coarser and its weights take up to four times the space
# where the polynomials are evaluated, besides at infinity; the smaller the numbers, the less is lost to rounding
_POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2)),
}


def minimal_filter(m: int) -> tuple[Array, Array, Array]:
    """A^T `[m, m + 2]`, G `[m + 2, 3]`, B^T `[m + 2, m + 2]` of F(m, 3), by Toom and Cook.

    `A^T ((G w) * (B^T x))` are m outputs of a filter of 3 taps w on m + 2 inputs x.
    """
    points = _POINTS[m]
    size = m + _TAPS - 1
    a, g, b = np.zeros((m, size)), np.zeros((size, _TAPS)), np.zeros((size, size))
    for i, point in enumerate(points):
        others = [other for other in points if other != point]
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        a[:, i] = [float(point**k) for k in range(m)]
        g[i] = [float(point**k / scale) for k in range(_TAPS)]
        b[i, :-1] = _product(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = _product(points)
    return a, g, b


def _product(roots: tuple[Fraction, ...] | list[Fraction]) -> list[float]:
    """Coefficients of the polynomial with these roots, lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [low - root * high for low, high in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return [float(value) for value in found]


def winograd(view: View, m: int = 4) -> Iterator[Rewrite]:
    """Every 3x3 convolution of images that tiles of `m` x `m` outputs cover; m is 2 or 4."""
    for node in view.nodes:
        weight = view.constant(node.input[1]) if node.op_type == "Conv" else None
        if weight is not None and _fits(view, node, weight, m):
            yield _tiled(view, node, weight, m)


def _fits(view: View, node: onnx.NodeProto, weight: NDArray[Any], m: int) -> bool:
    known, shape = attributes(node), view.shape(node.input[0])
    bias_is_known = len(node.input) < 3 or view.constant(node.input[2]) is not None
    return (
        bias_is_known
        and weight.shape[2:] == (_TAPS, _TAPS)
        and known.get("group", 1) == 1
        and known.get("strides", [1, 1]) == known.get("dilations", [1, 1]) == [1, 1]
        and known.get("pads") == [1, 1, 1, 1]
        and len(shape) == 4
        and min(shape[2:]) >= m
        and shape[2] % m == shape[3] % m == 0
    )


def _tiled(view: View, node: onnx.NodeProto, weight: NDArray[Any], m: int) -> Rewrite:
    """What stands for a convolution, with constants computed in float64 and kept in the weights' type."""
    a, g, b = minimal_filter(m)
    height, width = view.shape(node.input[0])[2:]
    places, tiles = len(b) ** 2, (height // m) * (width // m)
    rows, columns = weight.shape[:2]
    rewrite = Rewrite([node, *activation(view, node)], margin=_MARGIN)

    def constant(what: str, values: Array) -> str:
        return rewrite.constant(what, values.astype(weight.dtype))

    sizes, step = rewrite.sizes, rewrite.step
    single = step("Reshape", node.input[0], sizes("single", -1, 1, height, width))
    corners = constant("input", np.einsum("ai,bj->abij", b, b).reshape(places, 1, *b.shape))
    spread = step("Conv", single, corners, strides=[m, m], pads=[1, 1, 1, 1])  # [B C, places, H/m, W/m]
    by_channel = step("Reshape", spread, sizes("by_channel", -1, columns, places, tiles))
    by_place = step("Transpose", by_channel, perm=[2, 1, 0, 3])
    mixed = step("Reshape", by_place, sizes("by_place", places, columns, -1))
    kernels = np.einsum("ai,fcij,bj->abfc", g, weight.astype(np.float64), g, optimize=True)
    kernel = constant("weight", kernels.reshape(places, rows, columns))
    product = step("MatMul", kernel, mixed)  # [places, F, B tiles]
    flat = step("Reshape", product, sizes("flat", places, -1))
    outputs = constant("output", np.einsum("ia,jb->ijab", a, a).reshape(m * m, places))
    inside = step("MatMul", outputs, flat)  # [m m, F B tiles]
    by_output = step("Reshape", inside, sizes("by_output", m * m, rows, -1, tiles))
    by_image = step("Transpose", by_output, perm=[2, 0, 1, 3])
    planes = step("Reshape", by_image, sizes("planes", -1, m * m * rows, height // m, width // m))
    image = step("DepthToSpace", planes, blocksize=m, mode="DCR")
    bias = view.constant(node.input[2]) if len(node.input) > 2 else None
    if bias is not None:
        image = step("Add", image, constant("bias", bias.reshape(rows, 1, 1)))
    for active in rewrite.old[1:]:
        image = step(active.op_type, image, **attributes(active))
    return rewrite.end()
