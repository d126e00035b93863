"""Residual factors folded into weights.

A tensor may hold its values times any factor, if whoever makes it and all who read it know. Convolutions and products
with constants can take a factor in and hand another one out; what is linear or homogeneous hands on what it gets, sums
want the same of all their terms, and everything else wants values as they are. A division by a constant is then
nothing but another factor, where the rest of the graph allows it.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import helper

from hflow_rt.export.rewriting import Rewrite, View, attributes

__all__ = ["residual_factors"]

_PLAIN = ""  # the tensor of factor 1
# the first input, or all of them, by the same factor as the output
_HAND_ON = {"LeakyRelu", "Relu", "Resize", "Slice", "AveragePool", "Split", "Reshape", "Transpose", "DepthToSpace"}
_ALIKE = {"Add", "Sub", "Concat"}


class _Factors:
    """Known ratios between the factors of tensors: a forest in which each tensor is so many times its parent."""

    def __init__(self) -> None:
        self._parents: dict[str, tuple[str, float]] = {}

    def find(self, name: str) -> tuple[str, float]:
        """The root of a tensor and how many times the root's its factor is."""
        times = 1.0
        while name in self._parents:
            name, step = self._parents[name]
            times *= step
        return name, times

    def tie(self, name: str, other: str, times: float = 1.0) -> bool:
        """Let the factor of `other` be so many times that of `name`; False if they are known to differ."""
        (root, own), (other_root, others) = self.find(name), self.find(other)
        if root == other_root:
            return _same(others, own * times)
        if other_root == _PLAIN:  # stays a root
            self._parents[root] = other_root, others / (own * times)
        else:
            self._parents[other_root] = root, own * times / others
        return True

    def __getitem__(self, name: str) -> float:
        """The factor; of what is tied to nothing plain, the root may have any."""
        return self.find(name)[1]


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-12 * abs(other)


def residual_factors(view: View) -> Iterator[Rewrite]:
    """One rewrite, of every division and multiplication by a constant that the weights around it can take over."""
    factors = _Factors()
    for name in view.fixed():
        factors.tie(_PLAIN, name)
    divisors = {}
    for node in view.nodes:
        divisor = _divisor(view, node)
        if divisor is not None:
            divisors[id(node)] = divisor
        else:
            _constrain(view, node, factors)
    gone = [
        node
        for node in view.nodes
        if id(node) in divisors
        and not view.is_result(node.output[0])
        and factors.tie(node.input[0], node.output[0], divisors[id(node)])
    ]
    if gone:
        yield _folded(view, gone, divisors, factors)


def _divisor(view: View, node: onnx.NodeProto) -> float | None:
    """What a node divides by, if that is one positive constant."""
    if node.op_type not in ("Div", "Mul") or view.proto(node.input[0]) is not None:
        return None
    constant = view.constant(node.input[1])
    if constant is None or constant.size != 1 or constant.dtype.kind != "f" or not constant.item() > 0:
        return None
    return float(constant.item()) if node.op_type == "Div" else 1 / float(constant.item())


def _constrain(view: View, node: onnx.NodeProto, factors: _Factors) -> None:
    if _takes_factors(view, node):
        return
    data = [name for name in node.input if name and view.proto(name) is None]
    tied: Iterable[str]
    if node.op_type == "Shape":
        tied = (_PLAIN, *node.output)
    elif node.op_type in _HAND_ON or (node.op_type == "Pad" and _with_zeros(view, node)):
        tied = (node.input[0], *node.output)
    elif node.op_type in _ALIKE and len(data) == len(node.input):
        tied = (*data, *node.output)
    else:
        tied = (_PLAIN, *data, *node.output)
    first, *others = tied
    for other in others:  # all by the same factor, for divisions come later; so none of these can fail
        factors.tie(first, other)


def _with_zeros(view: View, node: onnx.NodeProto) -> bool:
    """Whether a node pads with zeros or with what is there, not with a value of its own."""
    if attributes(node).get("mode", b"constant") != b"constant" or len(node.input) < 3 or not node.input[2]:
        return True
    value = view.constant(node.input[2])
    return value is not None and not value.any()


def _takes_factors(view: View, node: onnx.NodeProto) -> bool:
    """Whether a node has constants that factors of its input and its output can go into."""
    if node.op_type == "MatMul":
        return sum(view.proto(name) is not None for name in node.input) == 1
    if node.op_type in ("Conv", "InstanceNormalization"):
        return all(view.proto(name) is not None for name in node.input[1:])
    return False


def _folded(view: View, gone: list[onnx.NodeProto], divisors: dict[int, float], factors: _Factors) -> Rewrite:
    """Without the nodes `gone`, and with what that takes in all constants around."""
    left_out = {id(node) for node in gone}
    renamed = {node.output[0]: node.input[0] for node in gone}

    def source(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    changed: list[tuple[onnx.NodeProto, onnx.NodeProto]] = []
    rewrite = Rewrite([], sure=True)
    for node in view.nodes:
        if id(node) in left_out:
            continue
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.input[:] = [source(name) for name in node.input]
        if id(node) in divisors or _takes_factors(view, node):
            _take(view, node, new, rewrite, factors)
        if new != node:
            changed.append((node, new))
    rewrite.old = [*gone, *(old for old, _ in changed)]
    rewrite.new = [new for _, new in changed]
    return rewrite


def _take(view: View, old: onnx.NodeProto, new: onnx.NodeProto, rewrite: Rewrite, factors: _Factors) -> None:
    """Put into the constants of a node the factors of what it reads and makes."""
    after = factors[old.output[0]]
    before = next(factors[name] for name in old.input if view.proto(name) is None)

    def put(index: int, times: float) -> None:
        values = view.constant(old.input[index])
        assert values is not None
        if not _same(times, 1):
            new.input[index] = f"{old.output[0]}.times{index}"
            rewrite.add(new.input[index], (values.astype(np.float64) * times).astype(values.dtype))

    if old.op_type == "InstanceNormalization":  # what it reads is normalised whatever its scale, but for epsilon
        for index in (1, 2):
            put(index, after)
        epsilon = attributes(old).get("epsilon", 1e-5) * before**2
        if before != 1:
            kept = [attribute for attribute in old.attribute if attribute.name != "epsilon"]
            del new.attribute[:]
            new.attribute.extend([*kept, helper.make_attribute("epsilon", epsilon)])
        return
    constants = [index for index, name in enumerate(old.input) if name and view.proto(name) is not None]
    for index in constants:
        bias = old.op_type == "Conv" and index == 2
        inverted = old.op_type == "Div"
        times = after if bias else after / before
        put(index, 1 / times if inverted else times)
