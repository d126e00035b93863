"""Equal graphs: what a rewrite is, what a pass sees of a graph, and how rewrites are carried out.

A pass yields a `Rewrite` for every place where it knows another way to the same values. Whether that way is taken is
not its business: `apply` asks `worth`.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["ACTIVATIONS", "Pass", "Rewrite", "View", "activation", "apply", "attributes"]

Array = NDArray[Any]
ACTIVATIONS = ("LeakyRelu", "Relu", "Tanh")
_MOST = 2**31 - 2**26  # bytes


@dataclass
class Rewrite:
    """`new` nodes for `old` ones: what these make for others, those make under the same names.

    constants: what the new nodes read besides the tensors that the old ones read. sure: whether it is less work for
    any runtime, so that nobody needs to ask what it is worth. margin: how many times as fast it has to be, for a
    rewrite also parts what the runtime would have run as one.
    """

    old: list[onnx.NodeProto]
    new: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    sure: bool = False
    margin: float = 1.1

    @property
    def name(self) -> str:
        """The tensor that the last old node makes, after which what is new can be named."""
        return str(self.old[-1].output[0])

    def add(self, name: str, values: Array) -> str:
        """Add a constant, `values` as they are; returns its name."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def constant(self, what: str, values: Array) -> str:
        """Add a constant that is named after what comes out."""
        return self.add(f"{self.name}.{what}", values)

    def sizes(self, what: str, *sizes: int) -> str:
        """Add a shape, or whatever else operators want as a list of integers."""
        return self.constant(what, np.array(sizes, np.int64))

    def step(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output, which comes from the same module as the first old node that came from one."""
        output = f"{self.name}.{len(self.new)}"
        self.new.append(helper.make_node(op, list(inputs), [output], output, **attributes))
        self.new[-1].metadata_props.extend(next((node.metadata_props for node in self.old if node.metadata_props), []))
        return output

    def end(self) -> "Rewrite":
        """Let the last node make what the last old one did; returns itself."""
        self.new[-1].output[:] = self.old[-1].output
        return self


class View:
    """Who reads each tensor of a graph, its constants and its sizes; 0 where a size is not fixed."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph  # sizes that are computed, too
        self.nodes: list[onnx.NodeProto] = list(proto.graph.node)
        self._constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.types = {
            value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers[name].append(node)
        self._inputs = [value.name for value in proto.graph.input]
        self._results = {value.name for value in proto.graph.output}
        self.opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
        self.ir_version = proto.ir_version

    def shape(self, name: str) -> list[int]:
        """`[]` where nothing is known."""
        kind = self.types.get(name)
        return [] if kind is None else [dimension.dim_value for dimension in kind.shape.dim]

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of a tensor whose type is known."""
        return helper.tensor_dtype_to_np_dtype(self.types[name].elem_type)

    def fixed(self) -> list[str]:
        """Tensors that come into the graph or leave it, and constants."""
        return [*self._inputs, *self._results, *self._constants]

    def is_result(self, name: str) -> bool:
        """Whether a tensor leaves the graph."""
        return name in self._results

    def constant(self, name: str) -> Array | None:
        """Values of a constant."""
        tensor = self._constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def proto(self, name: str) -> onnx.TensorProto | None:
        """A constant as the graph has it."""
        return self._constants.get(name)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor."""
        return self._readers.get(name, [])

    def only_reader(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The one node that reads what `node` makes, if nothing else sees it."""
        readers = self._readers.get(node.output[0], [])
        alone = len(node.output) == len(readers) == 1 and node.output[0] not in self._results
        return readers[0] if alone else None


Pass = Callable[[View], Iterator[Rewrite]]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes by name, as Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def activation(view: View, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The activation that alone reads what a node makes, which runtimes compute along with it."""
    reader = view.only_reader(node)
    return [reader] if reader is not None and reader.op_type in ACTIVATIONS else []


def apply(proto: onnx.ModelProto, found: Pass, worth: Callable[[View, Rewrite], bool]) -> int:
    """Rewrite `proto` in place wherever `found` knows a way that is `worth` it; how often that was.

    Rewrites that share nodes exclude each other, and the first is asked first. None is taken whose constants would make
    the graph larger than a message of protobuf can be.
    """
    view = View(proto)
    room = _MOST - sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    gone: set[int] = set()
    taken: list[Rewrite] = []
    for rewrite in found(view):
        ids = {id(node) for node in rewrite.old}
        size = sum(len(tensor.raw_data) for tensor in rewrite.constants)
        if not ids & gone and size < room and (rewrite.sure or worth(view, rewrite)):
            room -= size
            gone |= ids
            taken.append(rewrite)
    if taken:
        nodes = [node for node in view.nodes if id(node) not in gone]
        nodes = _sorted(proto, [*nodes, *(node for rewrite in taken for node in rewrite.new)])
        constants = [*proto.graph.initializer, *(tensor for rewrite in taken for tensor in rewrite.constants)]
        used = {name for node in nodes for name in node.input}
        _replace(proto.graph.node, nodes)
        _replace(proto.graph.initializer, [tensor for tensor in constants if tensor.name in used])
    return len(taken)


def _sorted(proto: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Every node that a result needs, after those that make what it reads."""
    makers = {name: node for node in nodes for name in node.output}
    placed: dict[int, onnx.NodeProto] = {}
    waiting = [makers[value.name] for value in reversed(proto.graph.output) if value.name in makers]
    while waiting:
        node = waiting[-1]
        missing = [makers[name] for name in node.input if name in makers and id(makers[name]) not in placed]
        if missing:
            waiting += missing
        else:
            placed[id(waiting.pop())] = node
    return list(placed.values())


def _replace(entries: Any, instead: list[Any]) -> None:
    """Put other messages into a repeated field that may hold some of them."""
    kept = copy.deepcopy(instead)
    del entries[:]
    entries.extend(kept)
