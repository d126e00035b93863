"""Keep the constants of a graph in half precision where they are half-precision numbers times a scale.

A model whose weights were rounded to half precision has such constants: folding multiplies a layer's weights by its
gain, one number, one for each output channel, or one for each output and one for each input channel. The graph then
holds the rounded weights, a Cast and a Mul for each gain but 1, which runtimes fold when they open it, so that
everything is computed in float32 from the same numbers as before, up to their last bits.
"""

import hashlib
import math
from collections.abc import Collection, Container, Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from hflow_rt.models.family import Gain

__all__ = ["halve"]

_SMALLEST = 256  # elements; below, the two nodes are larger than what they save
_FIRST = 64  # elements that sort out most gains
_TOLERANCE = 3 * 2.0**-24  # relative: the folded constant's rounding, and what folding made of it before


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
        weights, factors = split
        count += 1
        half, steps = f"{tensor.name}.half", [*(f"{tensor.name}.wide{i}" for i in range(len(factors))), tensor.name]
        kept.append(numpy_helper.from_array(weights, half))
        nodes.append(helper.make_node("Cast", [half], steps[:1], to=onnx.TensorProto.FLOAT))
        for index, factor in enumerate(factors):
            kept.append(numpy_helper.from_array(factor.astype(np.float32), f"{tensor.name}.scale{index}"))
            nodes.append(helper.make_node("Mul", [steps[index], kept[-1].name], [steps[index + 1]]))
    rest = list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(kept)
    proto.graph.node.extend(nodes + rest)
    return count


_Split = tuple[NDArray[np.float16], list[NDArray[np.float64]]]


def _split(values: NDArray[np.float32], gains: Collection[Gain], stored: Container[bytes]) -> _Split | None:
    """Half-precision numbers and what they are multiplied by to be `values`: stored ones, else the first that fit."""
    first = None
    for split in _splits(values, gains):
        if hashlib.sha256(split[0].tobytes()).digest() in stored:
            return split
        first = first or split
    return first


def _splits(values: NDArray[np.float32], gains: Collection[Gain]) -> Iterator[_Split]:
    """What `_split` chooses from, by gain."""
    exact = values.astype(np.float64)
    axes = range(exact.ndim)
    # a few of each channel sort out most gains
    some = max(1, _FIRST * exact.shape[1] // exact.size) if exact.ndim > 1 else 1
    for gain in gains:
        given = [np.asarray(part, np.float64) for part in (gain if isinstance(gain, tuple) else (gain,))]
        if any(factor.ndim and factor.shape != exact.shape[axis : axis + 1] for axis, factor in enumerate(given)):
            continue
        factors = [
            factor.reshape([-1 if axis == own else 1 for axis in axes]) if factor.ndim else factor
            for own, factor in enumerate(given)
        ]
        few = [factor[:, :some] if exact.ndim > 1 and factor.ndim else factor for factor in factors]
        if _fits(exact[:, :some] if exact.ndim > 1 else exact, few) and _fits(exact, factors):
            yield (exact / _product(factors)).astype(np.float16), [one for one in factors if one.ndim or one != 1]


def _fits(values: NDArray[np.float64], factors: list[NDArray[np.float64]]) -> bool:
    scale = _product(factors)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # infinite and NaN do not fit
        weights = (values / scale).astype(np.float16).astype(np.float64)
    return bool((np.abs(weights * scale - values) <= _TOLERANCE * np.abs(values)).all())


def _product(factors: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return math.prod(factors[1:], start=factors[0])
