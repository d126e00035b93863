"""Mixed precision, written into a graph: nets compute in float16, the flow's state and all that bounds it in float32.

A flow whose state is rounded to half precision cannot be inverted, but its nets may be: both routes read the same
state and so compute the same scale and shift, whatever their precision. Sums over pixels, statistics of norms, log-
determinants, mixing and the affine maps stay in float32. Every runtime then runs the same typed graph.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hflow_rt.errors import CheckpointError
from hflow_rt.manifest import MODULE

__all__ = ["to_mixed_precision"]

# What the nets spend their time on
_HEAVY = {"Conv", "Gemm"}
# What may join them where it reads what they made
_LIGHT = {
    "Add", "AveragePool", "Clip", "Concat", "Div", "LeakyRelu", "Mul", "Pad", "Relu", "Resize", "Slice", "Split",
    "Tanh",
}  # fmt: skip
_NORM = "InstanceNormalization"  # sums in float32; what reads it may be in half precision again
_ONLY_FIRST = {"Resize"}  # whose other inputs have a type of their own
_LARGEST = 65504


def to_mixed_precision(proto: onnx.ModelProto, nets: Collection[str], outer: Collection[str] = ()) -> int:
    """Compute the nodes of the modules `nets` in float16, in place; how many there are.

    nets, outer: patterns of module paths that end in a dot, such as `*.decoder.*`; what matches `outer` stays in
    float32. Nodes that the exporter gives no module follow what they read. Inputs and outputs of the graph stay
    float32. Raises `CheckpointError` for weights beyond the range of float16.
    """
    graph = proto.graph
    floats = _float_tensors(proto)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    halves: set[str] = set()  # tensors made in float16
    welcome: set[str] = set()  # and those that what reads them may round
    chosen = set()
    for index, node in enumerate(graph.node):
        module = next((p.value for p in node.metadata_props if p.key == MODULE), "") + "."
        inside = module == "." or (_matches(module, nets) and not _matches(module, outer))
        reads = {name for name in node.input if name in floats and name not in constants}
        follows = bool(reads & (halves | welcome))
        if module == ".":
            follows = bool(reads) and reads <= halves | welcome
        heavy = node.op_type in _HEAVY and module != "." and inside
        if heavy or (node.op_type in _LIGHT and inside and follows):
            chosen.add(index)
            halves.update(name for name in node.output if name in floats)
        elif node.op_type == _NORM and inside:
            welcome.update(node.output)
    _rewrite(graph, chosen, floats, halves)
    return len(chosen)


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def _float_tensors(proto: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors: constants, inputs and values on the way."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {tensor.name for tensor in inferred.initializer if tensor.data_type == TensorProto.FLOAT}


def _rewrite(graph: onnx.GraphProto, chosen: set[int], floats: set[str], halves: set[str]) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    made: dict[str, str] = {}  # a tensor in the other precision

    def other(name: str, half: bool) -> str:
        """The tensor `name` in the precision it is not made in: a constant anew, anything else by a cast."""
        if name not in made:
            made[name] = f"{name}.{'float16' if half else 'float32'}"
            if name in constants:
                graph.initializer.append(_half_constant(constants[name], made[name]))
            else:
                to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
                nodes.append(helper.make_node("Cast", [name], [made[name]], f"cast_{made[name]}", to=to))
        return made[name]

    renamed = {name: f"{name}.made" for name in outputs & halves}
    for index, node in enumerate(graph.node):
        half = index in chosen
        for place, name in enumerate(node.input):
            if name not in floats or (half and place and node.op_type in _ONLY_FIRST):
                continue
            name = renamed.get(name, name)
            if (name in halves or name in renamed.values()) != half:
                node.input[place] = other(name, half)
            else:
                node.input[place] = name
        if half:
            node.output[:] = [renamed.get(name, name) for name in node.output]
        nodes.append(node)
    for name, inner in renamed.items():
        nodes.append(helper.make_node("Cast", [inner], [name], f"cast_{name}", to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    rest = list(nodes)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(rest)
    graph.initializer.extend(kept)


def _half_constant(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    if np.abs(values).max(initial=0) > _LARGEST:
        raise CheckpointError(
            f"{tensor.name} exceeds the range of half precision ({_LARGEST}); export with --precision fp32"
        )
    return numpy_helper.from_array(values.astype(np.float16), name)
