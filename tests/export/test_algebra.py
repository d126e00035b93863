"""Every rewrite equals what it replaces, in float64, at several sizes and batches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hflow_rt.export.algebra import branches, concatenation, resampling, sizes, taps
from hflow_rt.export.residual_factors import residual_factors
from hflow_rt.export.rewriting import Pass, apply
from hflow_rt.export.winograd import winograd

Inputs = dict[str, tuple[int, ...]]


class Builder:
    """A small graph in float64."""

    def __init__(self, **inputs: tuple[int, ...]) -> None:
        self.inputs, self.nodes, self.constants = inputs, [], []
        self.rng = np.random.default_rng(0)

    def constant(self, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"t{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, names[0], **attributes))
        return names[0] if outputs == 1 else names

    def conv(self, x: str, c_in: int, c_out: int, kernel: int = 3, biased: bool = True, **attributes: Any) -> str:
        weight = self.constant(self.rng.standard_normal((c_out, c_in, kernel, kernel)))
        bias = [self.constant(self.rng.standard_normal(c_out))] if biased else []
        options = {"pads": [kernel // 2] * 4, "kernel_shape": [kernel, kernel]} | attributes
        return str(self.add("Conv", x, weight, *bias, **options))

    def leaky(self, x: str) -> str:
        return str(self.add("LeakyRelu", x, alpha=0.1))

    def blur_up(self, x: str) -> str:
        padded = self.add("Pad", x, self.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1])), mode="reflect")
        scale = self.constant(np.array([1, 1, 2, 2], np.float32))
        wide = self.add("Resize", padded, "", scale, mode="linear", coordinate_transformation_mode="half_pixel")
        cut = [self.constant(np.array(values)) for values in ([0, 0], [-2, -2], [2, 3])]
        return str(self.add("Slice", wide, *cut))

    def blur_down(self, x: str, channels: int) -> str:
        padded = self.add("Pad", x, self.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])), mode="reflect")
        taps = np.array([1, 3, 3, 1]) / 8
        weight = self.constant(np.broadcast_to(np.outer(taps, taps), (channels, 1, 4, 4)))
        return str(self.add("Conv", padded, weight, group=channels, strides=[2, 2], kernel_shape=[4, 4]))

    def model(self, *outputs: str) -> onnx.ModelProto:
        kind = onnx.TensorProto.DOUBLE
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(name, kind, ["batch", *shape]) for name, shape in self.inputs.items()],
            [helper.make_tensor_value_info(name, kind, [None] * 4) for name in outputs],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def proved(proto: onnx.ModelProto, found: Pass, times: int = 1, worth: Callable[..., bool] = lambda *_: True) -> Any:
    """Rewrite `proto`, `times` times, and return it; what it computes has not changed."""
    before = onnx.ModelProto()
    before.CopyFrom(proto)
    assert apply(proto, found, worth) == times
    onnx.checker.check_model(proto, full_check=True)
    for batch in (1, 3):
        rng = np.random.default_rng(batch)
        feeds = {
            value.name: rng.standard_normal([batch, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:])])
            for value in proto.graph.input
        }
        expected, got = (ReferenceEvaluator(model).run(None, feeds) for model in (before, proto))
        for one, other in zip(expected, got, strict=True):
            assert one.shape == other.shape
            assert np.abs(one).max() > 0.01
            assert np.abs(one - other).max() < 1e-11 * max(1, np.abs(one).max())
    return proto


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (6, 2)])
@pytest.mark.parametrize("times", [1, 2])
def test_blurs_are_two_products(size: tuple[int, int], times: int) -> None:
    up = Builder(x=(3, *size))
    y = "x"
    for _ in range(times):
        y = up.blur_up(y)
    assert operators(proved(up.model(up.leaky(y)), resampling)) == ["MatMul", "MatMul", "LeakyRelu"]


@pytest.mark.parametrize(("size", "times"), [((8, 8), 1), ((8, 12), 2), ((16, 4), 1)])
def test_halvings_are_two_products(size: tuple[int, int], times: int) -> None:
    down = Builder(x=(3, *size))
    y = "x"
    for _ in range(times):
        y = down.blur_down(y, 3)
    assert operators(proved(down.model(down.leaky(y)), resampling)) == ["MatMul", "MatMul", "LeakyRelu"]
    mean = Builder(x=(3, *size))
    pooled = mean.add("AveragePool", "x", kernel_shape=[2, 2], strides=[2, 2])
    assert operators(proved(mean.model(mean.leaky(pooled)), resampling)) == ["MatMul", "MatMul", "LeakyRelu"]


def test_a_size_that_is_computed_is_known_all_the_same() -> None:
    build = Builder(x=(3, 4, 6))
    known = build.add("Shape", build.leaky("x"), start=0, end=2)
    size = build.add("Concat", known, build.constant(np.array([8, 12])), axis=0)
    options = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    wide = build.add("Resize", "t0_0", "", "", size, **options)
    proto = proved(build.model(build.leaky(wide)), sizes)
    assert operators(proto) == ["LeakyRelu", "Resize", "LeakyRelu"]
    assert operators(proved(proto, resampling)) == ["LeakyRelu", "MatMul", "MatMul", "LeakyRelu"]


def test_a_step_that_others_read_ends_a_chain() -> None:
    build = Builder(x=(2, 8, 8))
    half = build.blur_down("x", 2)
    quarter = build.blur_down(half, 2)
    proto = proved(build.model(build.leaky(half), build.leaky(quarter)), resampling, times=2)
    assert operators(proto).count("MatMul") == 4


def test_what_is_no_resampling_stays() -> None:
    build = Builder(x=(4, 8, 8))
    uneven = build.constant(build.rng.standard_normal((4, 1, 3, 3)))
    y = build.add("Conv", "x", uneven, group=4, kernel_shape=[3, 3], pads=[1, 1, 1, 1])  # another filter a channel
    same = build.constant(np.broadcast_to(build.rng.standard_normal((1, 1, 3, 3)), (4, 1, 3, 3)))
    y = build.add("Conv", build.leaky(y), same, group=4, kernel_shape=[3, 3])  # not separable
    cut = [build.constant(np.array(values)) for values in ([1], [3], [1])]
    y = build.add("Slice", build.leaky(y), *cut)  # of channels
    y = build.add("Pad", build.leaky(y), build.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))  # zeros
    y = build.add("Pad", y, build.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])), mode="reflect")  # no work
    proto = build.model(build.leaky(y))
    before = proto.SerializeToString()
    assert apply(proto, resampling, lambda *_: True) == 0
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_concatenated_channels_are_summed(biased: bool, kernel: int) -> None:
    build = Builder(x=(3, 5, 6), y=(2, 5, 6), z=(4, 5, 6))
    both = build.add("Concat", "x", "y", "z", axis=1)
    proto = build.model(build.leaky(build.conv(both, 9, 7, kernel, biased)))
    found = operators(proved(proto, concatenation))
    assert [found.count(name) for name in ("Concat", "Conv", "Add", "LeakyRelu")] == [0, 3, 2, 1]


def test_channels_that_others_read_stay_concatenated() -> None:
    build = Builder(x=(3, 5, 6), y=(2, 5, 6))
    both = build.add("Concat", "x", "y", axis=1)
    proto = build.model(build.conv(both, 5, 7), build.conv(both, 5, 2))
    assert apply(proto, concatenation, lambda *_: True) == 0


@pytest.mark.parametrize("width", [6, 16])
def test_nets_on_the_halves_are_one(width: int) -> None:
    build = Builder(x=(2 * width, 6, 5))
    left, right = build.add("Split", "x", outputs=2, axis=1, num_outputs=2)
    ends = [build.conv(build.leaky(build.conv(half, width, width)), width, 3, 1) for half in (left, right)]
    proto = proved(build.model(*ends), branches)
    assert operators(proto) == ["Conv", "LeakyRelu", "Conv", "Split"]
    groups = [attribute.i for attribute in proto.graph.node[0].attribute if attribute.name == "group"]
    assert groups == ([2] if width == 16 else [])


def test_unlike_nets_are_joined_as_far_as_they_are_alike() -> None:
    build = Builder(x=(8, 6, 5))
    left, right = build.add("Split", "x", outputs=2, axis=1, num_outputs=2)
    left, right = build.conv(left, 4, 4), build.conv(right, 4, 4)
    proto = proved(build.model(build.leaky(left), build.conv(right, 4, 3, 1)), branches)
    assert sorted(operators(proto)) == ["Conv", "Conv", "LeakyRelu", "Split"]
    apart = Builder(x=(8, 6, 5))
    left, right = apart.add("Split", "x", outputs=2, axis=1, num_outputs=2)
    assert apply(apart.model(apart.conv(left, 4, 4), apart.conv(right, 4, 4, 1)), branches, lambda *_: True) == 0


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (1, 3)])
def test_taps_are_summed(biased: bool, size: tuple[int, int]) -> None:
    """Along one axis, along the other, and along both, where pointwise products are left and their sums."""
    for axes in ([2], [3], [2, 3]):
        build = Builder(x=(17, *size))
        proto = build.model(build.leaky(build.conv("x", 17, 5, biased=biased)))
        for axis in axes:
            proved(proto, partial(taps, axis=axis))
        shapes = sorted(tuple(tensor.dims)[2:] for tensor in proto.graph.initializer if len(tensor.dims) == 4)
        assert shapes == sorted(
            {(2,): [(1, 3), (3, 1)], (3,): [(1, 3), (3, 1)], (2, 3): [(1, 1), (1, 3), (3, 1)]}[tuple(axes)]
        )


@pytest.mark.parametrize("changes", [{"strides": [2, 2]}, {"dilations": [2, 2]}, {"group": 2}, {"pads": [2, 0, 1, 3]}])
def test_taps_of_other_convolutions(changes: dict[str, Any]) -> None:
    build = Builder(x=(8, 6, 10))
    proto = build.model(build.conv("x", 8 // changes.get("group", 1), 2, **changes))
    for axis in (2, 3):
        proved(proto, partial(taps, axis=axis), times=int("pads" in changes))


def residual(build: Builder, x: str, channels: int) -> str:
    """(leaky(W x + b) + x) / sqrt(2), as hflow's decoders have it."""
    total = build.add("Add", build.leaky(build.conv(x, channels, channels)), x)
    return str(build.add("Div", total, build.constant(np.sqrt(2.0))))


def test_residual_factors_go_into_weights() -> None:
    build = Builder(x=(3, 8, 8))
    y = build.leaky(build.conv("x", 3, 4))
    y = build.blur_up(residual(build, y, 4))
    y = residual(build, residual(build, y, 4), 4)
    ones, zeros = build.constant(np.ones(4)), build.constant(np.zeros(4))
    y = build.add("InstanceNormalization", y, ones, zeros, epsilon=0.1)
    build.add("Mul", build.conv(y, 4, 4), build.constant(np.array(3.0)))
    proto = proved(build.model(build.conv(build.nodes[-1].output[0], 4, 2)), residual_factors)
    assert not {"Div", "Mul"} & set(operators(proto))


def test_a_factor_that_shows_stays() -> None:
    build = Builder(x=(3, 4, 4))
    seen = residual(build, build.conv("x", 3, 3), 3)  # leaves the graph under its name
    bent = residual(build, build.conv("x", 3, 3), 3)
    other = build.add("Div", "x", build.constant(np.array(2.0)))  # of an input, into something that is not linear
    proto = build.model(seen, build.add("Tanh", bent), build.add("Exp", other))
    assert operators(proved(proto, residual_factors)).count("Div") == 2  # the weights before the other can take its own


def test_what_is_not_by_the_same_factor_stays() -> None:
    """A value of its own in the padding, a constant among what is handed on, sizes; and large factors differ."""
    half = np.array(2.0)
    ones = Builder(x=(3, 4, 4))
    y = ones.conv("x", 3, 4)
    edge = ones.add("Relu", ones.add("Div", y, ones.constant(half)))
    padded = ones.add("Pad", edge, ones.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])), ones.constant(np.array(1.0)))
    proto = ones.model(ones.conv(padded, 4, 2), ones.add("Tanh", y))
    assert apply(proto, residual_factors, lambda *_: True) == 0

    fixed = Builder(x=(3, 4, 4))
    offset = fixed.add("Reshape", fixed.constant(np.arange(4.0)), fixed.constant(np.array([1, 4, 1, 1])))
    total = fixed.add("Add", fixed.conv("x", 3, 4), offset)
    proto = fixed.model(fixed.add("Tanh", fixed.add("Div", total, fixed.constant(half))))
    assert apply(proto, residual_factors, lambda *_: True) == 0

    sized = Builder(x=(3, 4, 4))
    twice = sized.add("Mul", sized.add("Shape", "x", start=1, end=2), sized.constant(np.array([2])))
    shape = sized.add("Concat", sized.constant(np.array([-1])), twice, sized.constant(np.array([2, 4])), axis=0)
    proto = sized.model(sized.add("Reshape", sized.conv("x", 3, 3), shape))
    assert apply(proto, residual_factors, lambda *_: True) == 0

    large = Builder(x=(3, 4, 4))
    y = large.add("Relu", large.add("Mul", large.conv("x", 3, 3), large.constant(np.array(1e9))))
    once, thrice = (large.add("Mul", y, large.constant(np.array(times))) for times in (1.0, 3.0))
    proved(large.model(large.conv(large.add("Add", once, thrice), 3, 2)), residual_factors)


def test_a_graph_does_not_outgrow_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    from hflow_rt.export import rewriting

    build = Builder(x=(3, 5, 6), y=(2, 5, 6))
    proto = build.model(build.conv(build.add("Concat", "x", "y", axis=1), 5, 7))
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    monkeypatch.setattr(rewriting, "_MOST", size + 1000)
    assert apply(proto, concatenation, lambda *_: True) == 0
    monkeypatch.setattr(rewriting, "_MOST", 2 * size + 1000)
    proved(proto, concatenation)


def test_a_bias_that_is_computed_stays() -> None:
    build = Builder(x=(4, 8, 8), b=(1,))
    bias = build.add("Reshape", build.add("ReduceSum", "b", keepdims=0), build.constant(np.array([1])))
    weight = build.constant(build.rng.standard_normal((1, 4, 3, 3)))
    proto = build.model(build.add("Conv", "x", weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    assert apply(proto, winograd, lambda *_: True) == 0
