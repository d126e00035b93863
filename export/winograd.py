"""Wide 3x3 convolutions with fewer multiplications, for CPUs (Winograd's minimal filtering; Lavin and Gray 2016).

A tile of m x m outputs of a 3x3 convolution takes (m + 2)^2 products instead of 9 m^2: 2.25 times fewer for m = 2,
4 times for m = 4. The graph then holds, for each such convolution, `Y = A^T [(G W G^T) (B^T X B)] A`:

    X -> B^T X B        a convolution with (m + 2)^2 fixed outputs a channel
    (...) (...)         a matrix product over channels, one for each of the (m + 2)^2 places in a tile
    A^T [...] A         one more matrix product, and a rearrangement of tiles into an image

What is exact in exact arithmetic rounds differently: parity decides whether an engine may use it, as always.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["minimal_filter", "winograd"]

Array = NDArray[np.float64]
_TAPS = 3
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


def winograd(proto: onnx.ModelProto, m: int, narrowest: int, smallest: int) -> int:
    """Rewrite, in place, the 3x3 convolutions between at least `narrowest` channels of at least `smallest` pixels.

    m: side of a tile, 2 or 4; sizes that it does not divide stay. Returns how many there were.
    """
    sizes = _sizes(proto)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    rewritten = 0
    for node in proto.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        shape = sizes.get(node.input[0], []) if node.input else []
        if weight is None or not _fits(node, weight, shape, m, narrowest, smallest):
            nodes.append(node)
            continue
        nodes += _tiled(proto.graph, node, numpy_helper.to_array(weight), (shape[2], shape[3]), m)
        rewritten += 1
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(kept)
    return rewritten


def _sizes(proto: onnx.ModelProto) -> dict[str, list[int]]:
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    return {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input)
    }


def _fits(
    node: onnx.NodeProto, weight: onnx.TensorProto, shape: list[int], m: int, narrowest: int, smallest: int
) -> bool:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return (
        list(weight.dims[2:]) == [_TAPS, _TAPS]
        and min(weight.dims[:2]) >= narrowest
        and attributes.get("group", 1) == 1
        and list(attributes.get("strides", [1, 1])) == [1, 1]
        and list(attributes.get("dilations", [1, 1])) == [1, 1]
        and list(attributes.get("pads", [])) == [1, 1, 1, 1]
        and len(shape) == 4
        and shape[2] * shape[3] >= smallest
        and shape[2] % m == shape[3] % m == 0
    )


def _tiled(
    graph: onnx.GraphProto, node: onnx.NodeProto, weight: NDArray[np.floating[Any]], size: tuple[int, int], m: int
) -> list[onnx.NodeProto]:
    """The nodes that stand for a convolution, with constants computed in float64 and kept in the weights' type."""
    a, g, b = minimal_filter(m)
    places, tiles = len(b) ** 2, (size[0] // m) * (size[1] // m)
    rows, columns = weight.shape[:2]
    name = node.output[0]
    made: list[onnx.NodeProto] = []

    def constant(what: str, values: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(values.astype(weight.dtype), f"{name}.{what}"))
        return f"{name}.{what}"

    def shape(what: str, *sides: int) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(sides, np.int64), f"{name}.{what}"))
        return f"{name}.{what}"

    def step(op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{name}.{len(made)}"
        made.append(helper.make_node(op, list(inputs), [output], output, **attributes))
        made[-1].metadata_props.extend(node.metadata_props)
        return output

    single = step("Reshape", node.input[0], shape("single", -1, 1, *size))
    corners = constant("input", np.einsum("ai,bj->abij", b, b).reshape(places, 1, *b.shape))
    spread = step("Conv", single, corners, strides=[m, m], pads=[1, 1, 1, 1])  # [B C, places, H/m, W/m]
    by_channel = step("Reshape", spread, shape("by_channel", -1, columns, places, tiles))
    by_place = step("Transpose", by_channel, perm=[2, 1, 0, 3])
    mixed = step("Reshape", by_place, shape("by_place", places, columns, -1))
    kernels = np.einsum("ai,fcij,bj->abfc", g, weight.astype(np.float64), g, optimize=True)
    kernel = constant("weight", kernels.reshape(places, rows, columns))
    product = step("MatMul", kernel, mixed)  # [places, F, B tiles]
    flat = step("Reshape", product, shape("flat", places, -1))
    outputs = constant("output", np.einsum("ia,jb->ijab", a, a).reshape(m * m, places))
    inside = step("MatMul", outputs, flat)  # [m m, F B tiles]
    by_output = step("Reshape", inside, shape("by_output", m * m, rows, -1, tiles))
    by_image = step("Transpose", by_output, perm=[2, 0, 1, 3])
    planes = step("Reshape", by_image, shape("planes", -1, m * m * rows, size[0] // m, size[1] // m))
    image = step("DepthToSpace", planes, blocksize=m, mode="DCR")
    if len(node.input) > 2:
        bias = next(tensor for tensor in graph.initializer if tensor.name == node.input[2])
        image = step("Add", image, constant("bias", numpy_helper.to_array(bias).reshape(rows, 1, 1)))
    made[-1].output[0] = name
    return made
