"""Rewrites that are equal in exact arithmetic and that one or another runtime computes faster.

resampling      blurs, halvings and doublings    two products with small matrices, edges and all
concatenation   W [a, b]                         Wa a + Wb b
branches        two nets on the halves of h      one net with grouped convolutions
taps            W x, to few channels             the shifted sum of one filter a tap, to several times as many
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hflow_rt.export.rewriting import ACTIVATIONS, Rewrite, View, activation, attributes

__all__ = ["branches", "concatenation", "resampling", "sizes", "taps"]

Array = NDArray[Any]
_FINEST = 2.0**16  # parts that taps are counted in


def sizes(view: View) -> Iterator[Rewrite]:
    """Resizing to sizes that the graph computes, but that are known, as resizing by a constant."""
    for node in view.nodes:
        if node.op_type != "Resize" or len(node.input) < 4 or view.constant(node.input[3]) is not None:
            continue
        before, after = view.shape(node.input[0])[2:], view.shape(node.output[0])[2:]
        whole = [max(pair) % max(1, min(pair)) == 0 for pair in zip(before, after, strict=True)]
        if len(before) == 2 and all((*before, *after, *whole)):
            rewrite = Rewrite([node], sure=True)
            factors = np.array([1, 1, *(new / old for old, new in zip(before, after, strict=True))], np.float32)
            rewrite.step("Resize", node.input[0], "", rewrite.constant("factors", factors), **attributes(node))
            yield rewrite.end()


def resampling(view: View) -> Iterator[Rewrite]:
    """Chains of resampling steps along height and width as `A x B^T`, the same for every channel."""
    inside: set[int] = set()
    for node in view.nodes:
        if id(node) in inside or not _resamples(view, node):
            continue
        chain = [node]
        while (reader := view.only_reader(chain[-1])) is not None and reader.input[0] == chain[-1].output[0]:
            if not _resamples(view, reader):
                break
            chain.append(reader)
        inside |= {id(step) for step in chain}
        # padding and cutting alone are no work
        if any(step.op_type in ("Resize", "AveragePool", "Conv") for step in chain):
            found = _matrices(view, chain)
            if found is not None:
                yield _products(view, chain, *found)


def _resamples(view: View, node: onnx.NodeProto) -> bool:
    """Whether a node works along height and width only, on every channel alike."""
    known = attributes(node)
    if len(view.shape(node.input[0])) != 4 or len(view.shape(node.output[0])) != 4:
        return False
    if not all((*view.shape(node.input[0])[2:], *view.shape(node.output[0])[2:])):
        return False
    if node.op_type == "Conv":
        weight = view.constant(node.input[1])
        depthwise = weight is not None and weight.shape[1] == 1 and known.get("group", 1) == len(weight) > 1
        return depthwise and len(node.input) == 2 and bool((weight == weight[:1]).all())  # type: ignore[index]
    if node.op_type == "Pad":
        pads = view.constant(node.input[1])
        return known.get("mode") in (b"reflect", b"edge") and pads is not None and not pads[[0, 1, 4, 5]].any()
    if node.op_type == "Slice":
        axes = view.constant(node.input[3]) if len(node.input) > 3 else None
        fixed = all(view.constant(name) is not None for name in node.input[1:])
        return fixed and axes is not None and set(axes.tolist()) <= {2, 3}
    if node.op_type == "Resize":
        by_constant = len(node.input) == 3 and view.constant(node.input[2]) is not None
        return by_constant and known.get("mode") == b"linear"
    return node.op_type == "AveragePool"


def _matrices(view: View, chain: list[onnx.NodeProto]) -> tuple[Array, Array] | None:
    """A and B, read off what the chain makes of single rows and columns; None if that is not all it does."""
    height, width = view.shape(chain[0].input[0])[2:]
    rng = np.random.default_rng(0)
    trial = rng.standard_normal((2, 1, height, width))
    rows = np.broadcast_to(np.eye(height)[:, None, :, None], (height, 1, height, width))
    columns = np.broadcast_to(np.eye(width)[:, None, None, :], (width, 1, height, width))
    made = _run(view, chain, np.concatenate([rows, columns, trial]), np.float32)
    # float32 rounds no taps that are binary fractions of few digits; of the others, float64 is slow to come by
    if np.any(made[:-2] * _FINEST % 1):
        made = _run(view, chain, np.concatenate([rows, columns, trial]), np.float64)
    a, b = made[:height, 0, :, 0].T, made[height:-2, 0, 0, :].T
    expected = a @ trial @ b.T
    return (a, b) if np.abs(expected - made[-2:]).max() < 1e-4 * np.abs(expected).max() else None


def _run(view: View, chain: list[onnx.NodeProto], x: Array, kind: type[np.floating[Any]]) -> Array:
    """The chain on one channel, by ONNX Runtime in float32 or by ONNX's own evaluator."""
    import onnxruntime

    nodes, constants = [], []
    for step in chain:
        node = onnx.NodeProto()
        node.CopyFrom(step)
        if step.op_type == "Conv":
            weight = view.constant(step.input[1])
            assert weight is not None
            constants.append(numpy_helper.from_array(weight[:1].astype(kind), step.input[1]))
            kept = [attribute for attribute in step.attribute if attribute.name != "group"]
            del node.attribute[:]
            node.attribute.extend(kept)
        else:
            constants += [proto for name in step.input[1:] if (proto := view.proto(name)) is not None]
        nodes.append(node)
    named = {tensor.name: tensor for tensor in constants}
    begin, end = chain[0].input[0], chain[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "resampling",
        [helper.make_tensor_value_info(begin, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), x.shape)],
        [helper.make_tensor_value_info(end, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)],
        list(named.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", view.opset)], ir_version=view.ir_version)
    run: Any = ReferenceEvaluator(model)
    runtime: Any = onnxruntime
    if kind is np.float32:
        run = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Array = run.run(None, {begin: x.astype(kind)})[0].astype(np.float64)
    return found


def _products(view: View, chain: list[onnx.NodeProto], a: Array, b: Array) -> Rewrite:
    """The product on the right runs faster because it is one of all channels; so it takes the larger share."""
    rewrite = Rewrite(chain)
    kind = view.dtype(chain[0].input[0])
    left, right = rewrite.constant("rows", a.astype(kind)), rewrite.constant("columns", b.T.astype(kind))
    if len(a) < a.shape[1]:
        rewrite.step("MatMul", left, rewrite.step("MatMul", chain[0].input[0], right))
    else:
        rewrite.step("MatMul", rewrite.step("MatMul", left, chain[0].input[0]), right)
    return rewrite.end()


def concatenation(view: View) -> Iterator[Rewrite]:
    """Convolutions of concatenated channels as sums of convolutions, which need no concatenation."""
    for node in view.nodes:
        if node.op_type != "Concat" or attributes(node)["axis"] != 1:
            continue
        conv = view.only_reader(node)
        if conv is None or conv.op_type != "Conv" or attributes(conv).get("group", 1) != 1:
            continue
        weight = view.constant(conv.input[1])
        widths = [view.shape(name)[1] if len(view.shape(name)) == 4 else 0 for name in node.input]
        if weight is None or not all(widths) or sum(widths) != weight.shape[1]:
            continue
        rewrite = Rewrite([node, conv, *activation(view, conv)])
        parts = np.split(weight, np.cumsum(widths)[:-1], axis=1)
        total = ""
        for index, (name, part) in enumerate(zip(node.input, parts, strict=True)):
            bias = conv.input[2:] if index == 0 else []
            product = rewrite.step("Conv", name, rewrite.constant(f"part{index}", part), *bias, **attributes(conv))
            total = product if index == 0 else rewrite.step("Add", total, product)
        for active in rewrite.old[2:]:
            rewrite.step(active.op_type, total, **attributes(active))
        yield rewrite.end()


def branches(view: View) -> Iterator[Rewrite]:
    """Two equally built nets on the halves of the channels as one net of grouped convolutions."""
    for node in view.nodes:
        if node.op_type != "Split" or attributes(node).get("axis", 0) != 1 or len(node.output) != 2:
            continue
        widths = [view.shape(name)[1:2] for name in node.output]
        if widths[0] != widths[1] or not widths[0]:
            continue
        pairs = list(_alike(view, *node.output))
        if any(first.op_type == "Conv" for first, _ in pairs):
            yield _grouped(view, node, pairs)


def _alike(view: View, left: str, right: str) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Nodes that do the same to both tensors, one after the other, while nothing else reads them."""
    while True:
        readers = view.readers(left), view.readers(right)
        if any(len(found) != 1 for found in readers) or view.is_result(left) or view.is_result(right):
            return
        (first,), (second,) = readers
        same = first.op_type == second.op_type and attributes(first) == attributes(second)
        if first is second or not same or first.op_type not in ("Conv", *ACTIVATIONS):
            return
        if first.op_type == "Conv":
            weights = view.constant(first.input[1]), view.constant(second.input[1])
            if any(weight is None for weight in weights) or weights[0].shape != weights[1].shape:  # type: ignore[union-attr]
                return
            if attributes(first).get("group", 1) != 1 or len(first.input) != len(second.input):
                return
            if any(view.constant(name) is None for name in (*first.input[2:], *second.input[2:])):
                return
        yield first, second
        left, right = first.output[0], second.output[0]


# fewer channels than a vector holds: then zeros in one dense convolution cost less than two groups
_NARROW = 16


def _grouped(view: View, split: onnx.NodeProto, pairs: list[tuple[onnx.NodeProto, onnx.NodeProto]]) -> Rewrite:
    rewrite = Rewrite([split, *(node for pair in pairs for node in pair)])
    x = split.input[0]
    for index, (first, second) in enumerate(pairs):
        if first.op_type != "Conv":
            x = rewrite.step(first.op_type, x, **attributes(first))
            continue
        one, other = (view.constant(node.input[1]) for node in (first, second))
        assert one is not None
        assert other is not None
        inputs, options = [x], attributes(first)
        if min(len(one), one.shape[1]) < _NARROW:
            dense = np.concatenate([np.concatenate([one, 0 * other], 1), np.concatenate([0 * one, other], 1)])
            inputs.append(rewrite.constant(f"weight{index}", dense))
        else:
            inputs.append(rewrite.constant(f"weight{index}", np.concatenate([one, other])))
            options["group"] = 2
        if len(first.input) > 2:
            biases = [view.constant(node.input[2]) for node in (first, second)]
            inputs.append(rewrite.constant(f"bias{index}", np.concatenate(biases)))  # type: ignore[arg-type]
        x = rewrite.step("Conv", *inputs, **options)
    rewrite.step("Split", x, axis=1, num_outputs=2)
    rewrite.new[-1].output[:] = [node.output[0] for node in pairs[-1]]
    return rewrite


# more channels than this keep a processor busy as they are
_FEW = 64


def taps(view: View, axis: int) -> Iterator[Rewrite]:
    """Convolutions to few channels: each tap along `axis` (2 or 3) on its own, then the shifted sum.

    A processor computes many channels together, and those of a head are not enough: with the taps apart there are three
    times as many, and what is left to do on shifted pixels is a sum over as few.
    """
    for node in view.nodes:
        weight = view.constant(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or weight.ndim != 4 or weight.shape[axis] != 3:
            continue
        known = attributes(node)
        outputs, inputs = weight.shape[:2]
        plain = known.get("strides", [1, 1]) == known.get("dilations", [1, 1]) == [1, 1] and known.get("group", 1) == 1
        if plain and "pads" in known and outputs < inputs and outputs <= _FEW:
            yield _tap_by_tap(node, weight, known, axis)


def _tap_by_tap(node: onnx.NodeProto, weight: Array, known: dict[str, Any], axis: int) -> Rewrite:
    outputs, inputs = weight.shape[:2]
    count, other = weight.shape[axis], weight.shape[5 - axis]
    apart = np.moveaxis(weight, axis, 1).reshape(outputs * count, inputs, other)  # [F taps, C, other axis]
    places = np.eye(outputs * count, dtype=weight.dtype).reshape(outputs, count, -1).swapaxes(1, 2)  # [F, F taps, taps]
    along = [axis - 2, axis]  # where pads of the axis stand
    pads = np.array(known["pads"])
    outside, inside = pads.copy(), np.zeros_like(pads)
    outside[along], inside[along] = 0, pads[along]
    rewrite = Rewrite([node])
    each = rewrite.constant("apart", np.expand_dims(apart, axis))
    each = rewrite.step("Conv", node.input[0], each, pads=outside.tolist())
    shifted = rewrite.constant("shifted", np.expand_dims(places, 5 - axis))
    rewrite.step("Conv", each, shifted, *node.input[2:], pads=inside.tolist())
    return rewrite.end()
