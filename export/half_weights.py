"""Keep the constants of a graph in half precision where they are half-precision numbers times a scale.

A model whose weights were rounded to half precision has such constants: folding multiplies a layer's weights by its
gain, one number or one for each output channel. The graph then holds the rounded weights, a Cast and a Mul, which
runtimes fold when they open it, so that everything is computed in float32 from the same numbers as before, up to their
last bit.
"""

from collections.abc import Collection

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from hflow_rt.models.family import Gain

__all__ = ["halve"]

_SMALLEST = 256  # elements; below, the two nodes are larger than what they save
_FIRST = 64  # elements that sort out most gains
_TOLERANCE = 3 * 2.0**-24  # relative: the scale's own rounding, the product's, and the folded constant's


def halve(proto: onnx.ModelProto, gains: Collection[Gain]) -> int:
    """Rewrite, in place, every constant that is half-precision numbers times one of `gains`; how many there were."""
    kept, nodes = [], []
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        split = None if values.dtype != np.float32 or values.size < _SMALLEST else _split(values, gains)
        if split is None:
            kept.append(tensor)
            continue
        weights, scale = split
        half, wide, factor = (f"{tensor.name}{suffix}" for suffix in (".half", ".wide", ".scale"))
        kept.append(numpy_helper.from_array(weights, half))
        kept.append(numpy_helper.from_array(scale.astype(np.float32), factor))
        nodes.append(helper.make_node("Cast", [half], [wide], to=onnx.TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [wide, factor], [tensor.name]))
    rest = list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(kept)
    proto.graph.node.extend(nodes + rest)
    return len(nodes) // 2


def _split(
    values: NDArray[np.float32], gains: Collection[Gain]
) -> tuple[NDArray[np.float16], NDArray[np.float64]] | None:
    """Half-precision numbers and the scale whose product is `values`, if there is one."""
    exact = values.astype(np.float64)
    for given in gains:
        scale = np.asarray(given, np.float64)
        if scale.ndim and scale.shape != exact.shape[:1]:
            continue
        scale = scale.reshape(-1, *[1] * (exact.ndim - 1)) if scale.ndim else scale
        # a few of each channel sort out most gains
        few = exact.reshape(len(exact), -1)[:, : max(1, _FIRST // len(exact))]
        if _fits(few, scale.reshape(-1, 1) if scale.ndim else scale) and _fits(exact, scale):
            return (exact / scale).astype(np.float16), scale
    return None


def _fits(values: NDArray[np.float64], scale: NDArray[np.float64]) -> bool:
    with np.errstate(over="ignore"):  # too large for half precision is infinite, which does not fit
        weights = (values / scale).astype(np.float16).astype(np.float64)
    return bool((np.abs(weights * scale - values) <= _TOLERANCE * np.abs(values)).all())
