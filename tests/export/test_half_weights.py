"""Constants in half precision are the same constants, in half the bytes."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hflow_rt.export.half_weights import halve
from hflow_rt.models.registry import Family

SCALES = (0.7071067811865476, 0.0123456789, 1.0)


def product(values: np.ndarray) -> onnx.ModelProto:
    """y = x @ values"""
    rows, columns = values.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", columns])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(values, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("scale", SCALES)
def test_the_same_constant(scale: float) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((40, 30)).astype(np.float16)
    weights[0, :4] = 0, 1e-7, -6e-5, 300  # zero, subnormal numbers, a large one
    values = (weights.astype(np.float64) * scale).astype(np.float32)
    proto, changed = product(values), product(values)
    assert halve(changed, SCALES) == 1
    assert [node.op_type for node in changed.graph.node][:-1] == ["Cast"] + ["Mul"] * (scale != 1)
    onnx.checker.check_model(changed, full_check=True)
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in changed.graph.initializer}
    assert (kept["w.half"] == weights).all()
    assert "w" not in kept
    assert len(changed.SerializeToString()) < 0.6 * len(proto.SerializeToString())
    x = rng.standard_normal((3, 40)).astype(np.float32)
    scale_of_sum = np.abs(x) @ np.abs(values)
    assert (np.abs(run(changed, x) - run(proto, x)) <= 3e-7 * scale_of_sum).all()


def test_a_scale_for_each_channel() -> None:
    """As folding an actnorm leaves them; scales of another length, or of another layer, fit nothing."""
    rng = np.random.default_rng(2)
    weights, scale = rng.standard_normal((40, 30)).astype(np.float16), rng.uniform(0.3, 3, 40)
    values = (weights * scale[:, None]).astype(np.float32)
    proto, changed = product(values), product(values)
    assert halve(changed, [1.0, scale[:30], rng.uniform(0.3, 3, 40)]) == 0
    assert halve(changed, [1.0, scale[:30], rng.uniform(0.3, 3, 40), scale]) == 1
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in changed.graph.initializer}
    assert (kept["w.half"] == weights).all()
    x = rng.standard_normal((3, 40)).astype(np.float32)
    assert (np.abs(run(changed, x) - run(proto, x)) <= 3e-7 * (np.abs(x) @ np.abs(values))).all()


def test_a_scale_for_each_output_and_each_input() -> None:
    """As folding norms before and behind a convolution leaves them."""
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((40, 30)).astype(np.float16)
    rows, columns = rng.uniform(0.3, 3, 40), rng.uniform(0.3, 3, 30)
    values = (weights * rows[:, None] * columns).astype(np.float32)
    proto, changed = product(values), product(values)
    assert halve(changed, [1.0, rows, (columns, rows), (rows, rows[:30])]) == 0
    assert halve(changed, [1.0, rows, (rows, columns)]) == 1
    assert [node.op_type for node in changed.graph.node] == ["Cast", "Mul", "Mul", "MatMul"]
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in changed.graph.initializer}
    assert (kept["w.half"] == weights).all()
    x = rng.standard_normal((3, 40)).astype(np.float32)
    assert (np.abs(run(changed, x) - run(proto, x)) <= 4e-7 * (np.abs(x) @ np.abs(values))).all()


def test_every_convolution_of_a_rounded_nvae(tiny: Callable[[Family], Any]) -> None:
    torch = pytest.importorskip("torch")
    from hflow_rt.models.nvae import FAMILY

    model = copy.deepcopy(tiny(FAMILY))
    model.load_state_dict({name: v.half().to(v.dtype) for name, v in model.state_dict().items()})
    for norm in (one for one in model.modules() if hasattr(one, "running_var")):
        norm.running_var.uniform_(0.5, 2)
    spec = model.graphs()["inverse"]
    weights = [one.weight.numpy() for one in spec.module.modules() if isinstance(one, torch.nn.Conv2d)]
    large = [numpy_helper.from_array(one, f"w{i}") for i, one in enumerate(weights) if one.size >= 256]
    graph = helper.make_graph([], "weights", [], [], large)
    assert len(large) > 10
    assert halve(helper.make_model(graph), (*spec.gains, 1.0)) == len(large)


def test_numbers_that_are_stored_go_first() -> None:
    """Of gains that are powers of 2 apart each gives half-precision numbers; one gives those of the model file."""
    weights = np.random.default_rng(3).standard_normal((40, 30)).astype(np.float16)
    for stored, expected in ((set(), 2 * weights), ({hashlib.sha256(weights.tobytes()).digest()}, weights)):
        proto = product((weights * 0.5).astype(np.float32))
        assert halve(proto, [0.25, 0.5, 1.0], stored) == 1
        kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        assert (kept["w.half"] == expected).all()


def test_other_constants_stay() -> None:
    rng = np.random.default_rng(1)
    single = rng.standard_normal((40, 30)).astype(np.float32)
    almost = (single.astype(np.float16).astype(np.float64) * SCALES[0]).astype(np.float32)
    almost[-1, -1] *= np.float32(1 + 2**-20)  # one number of 1,200 is no half-precision number
    large = np.full((40, 30), 1e6, np.float32)
    small = single[:3, :5].astype(np.float16).astype(np.float32)
    for values in (single, almost, large, small):
        proto = product(values)
        before = proto.SerializeToString()
        assert halve(proto, SCALES) == 0
        assert proto.SerializeToString() == before
