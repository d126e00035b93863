"""Keep the constants of a graph in half precision where they are half-precision numbers times a scale.

A model whose weights were rounded to half precision has such constants: folding multiplies a layer's weights by its
gain, one number or one for each output channel. The graph then holds the rounded weights, a Cast and, for another gain
than 1, a Mul, which runtimes fold when they open it, so that everything is computed in float32 from the same numbers as
before, up to their last bit.
"""

import hashlib
from collections.abc import Collection, Container, Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from hflow_rt.models.family import Gain

__all__ = ["halve"]

_SMALLEST = 256  # elements; below, the two nodes are larger than what they save
_FIRST = 64  # elements that sort out most gains
_TOLERANCE = 3 * 2.0**-24  # relative: the scale's own rounding, the product's, and the folded constant's


def halve(proto: onnx.ModelProto, gains: Collection[Gain], stored: Container[bytes] = ()) -> int:
    """Rewrite, in place, every constant that is half-precision numbers times one of `gains`; how many there were.

    stored: sha256 digests of the numbers to prefer where several gains fit, because one is another times a power of 2.
    """
    kept, nodes, count = [], [], 0
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        split = None
        if values.dtype == np.float32 and values.size >= _SMALLEST:
            split = _split(values, gains, stored)
        if split is None:
            kept.append(tensor)
            continue
        weights, scale = split
        count += 1
        half, wide, factor = (f"{tensor.name}{suffix}" for suffix in (".half", ".wide", ".scale"))
        kept.append(numpy_helper.from_array(weights, half))
        if scale.ndim == 0 and scale == 1:
            nodes.append(helper.make_node("Cast", [half], [tensor.name], to=onnx.TensorProto.FLOAT))
            continue
        kept.append(numpy_helper.from_array(scale.astype(np.float32), factor))
        nodes.append(helper.make_node("Cast", [half], [wide], to=onnx.TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [wide, factor], [tensor.name]))
    rest = list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(kept)
    proto.graph.node.extend(nodes + rest)
    return count


_Split = tuple[NDArray[np.float16], NDArray[np.float64]]


def _split(values: NDArray[np.float32], gains: Collection[Gain], stored: Container[bytes]) -> _Split | None:
    """Half-precision numbers and the scale whose product is `values`: stored ones, else the first that fit."""
    first = None
    for split in _splits(values, gains):
        if hashlib.sha256(split[0].tobytes()).digest() in stored:
            return split
        first = first or split
    return first


def _splits(values: NDArray[np.float32], gains: Collection[Gain]) -> Iterator[_Split]:
    """What `_split` chooses from, by gain."""
    exact = values.astype(np.float64)
    for given in gains:
        scale = np.asarray(given, np.float64)
        if scale.ndim and scale.shape != exact.shape[:1]:
            continue
        scale = scale.reshape(-1, *[1] * (exact.ndim - 1)) if scale.ndim else scale
        # a few of each channel sort out most gains
        few = exact.reshape(len(exact), -1)[:, : max(1, _FIRST // len(exact))]
        if _fits(few, scale.reshape(-1, 1) if scale.ndim else scale) and _fits(exact, scale):
            yield (exact / scale).astype(np.float16), scale


def _fits(values: NDArray[np.float64], scale: NDArray[np.float64]) -> bool:
    with np.errstate(over="ignore"):  # too large for half precision is infinite, which does not fit
        weights = (values / scale).astype(np.float16).astype(np.float64)
    return bool((np.abs(weights * scale - values) <= _TOLERANCE * np.abs(values)).all())
