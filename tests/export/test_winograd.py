"""Convolutions with fewer multiplications are the same convolutions."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hflow_rt.export.rewriting import apply
from hflow_rt.export.winograd import minimal_filter, winograd


def rewritten(proto: onnx.ModelProto, m: int = 4) -> int:
    """Every convolution that can be, in place; how many."""
    return apply(proto, lambda view: winograd(view, m), worth=lambda view, rewrite: True)


def graph(weight: Any, bias: Any, size: tuple[int, int], **changes: Any) -> onnx.ModelProto:
    """One convolution of `[B, C, H, W]` and a leaky ReLU."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    attributes = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]} | changes
    constants = {"w": weight} | ({} if bias is None else {"b": bias})
    nodes = [
        helper.make_node("Conv", ["x", *constants], ["c"], "conv", **attributes),
        helper.make_node("LeakyRelu", ["c"], ["y"], alpha=0.1),
    ]
    nodes[0].metadata_props.add(key="module", value="net.conv")
    channels = weight.shape[1] * changes.get("group", 1)
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", kind, ["batch", channels, *size])],
            [helper.make_tensor_value_info("y", kind, ["batch", len(weight), None, None])],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


@pytest.mark.parametrize("m", [2, 4])
def test_minimal_filters_are_filters(m: int) -> None:
    rng = np.random.default_rng(m)
    a, g, b = minimal_filter(m)
    taps, values = rng.standard_normal(3), rng.standard_normal(m + 2)
    assert a @ ((g @ taps) * (b @ values)) == pytest.approx(np.correlate(values, taps, "valid"), abs=1e-13)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_rewritten_convolution_is_exact_in_float64(m: int, size: tuple[int, int], biased: bool) -> None:
    rng = np.random.default_rng(size[0] + m)
    weight, bias = rng.standard_normal((5, 6, 3, 3)), rng.standard_normal(5) if biased else None
    plain, fast = graph(weight, bias, size), graph(weight, bias, size)
    assert rewritten(fast, m) == 1
    assert "w" not in {tensor.name for tensor in fast.graph.initializer}
    onnx.checker.check_model(fast, full_check=True)
    for batch in (1, 3):
        x = rng.standard_normal((batch, 6, *size))
        (expected,), (found,) = (ReferenceEvaluator(g).run(None, {"x": x}) for g in (plain, fast))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-12


def test_onnx_runtime_computes_it_to_float32() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((32, 48, 3, 3)) / np.sqrt(9 * 48)).astype(np.float32)
    bias = rng.standard_normal(32).astype(np.float32)
    fast = graph(weight, bias, (16, 8))
    assert rewritten(fast) == 1
    x = rng.standard_normal((2, 48, 16, 8)).astype(np.float32)
    exact = ReferenceEvaluator(graph(weight.astype(np.float64), bias.astype(np.float64), (16, 8)))
    (expected,) = exact.run(None, {"x": x.astype(np.float64)})
    (found,) = onnxruntime.InferenceSession(fast.SerializeToString()).run(None, {"x": x})
    assert 0 < np.abs(found - expected).max() < 3e-5


@pytest.mark.parametrize(
    ("shape", "size", "changes"),
    [
        ((6, 6, 1, 1), (8, 8), {"kernel_shape": [1, 1], "pads": [0, 0, 0, 0]}),
        ((6, 6, 3, 3), (8, 8), {"strides": [2, 2]}),
        ((6, 6, 3, 3), (8, 8), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
        ((6, 6, 3, 3), (8, 8), {"pads": [0, 0, 0, 0]}),
        ((6, 6, 3, 3), (8, 8), {"group": 2}),
        ((6, 6, 3, 3), (8, 6), {}),  # not whole tiles
        ((6, 6, 3, 3), (12, 0), {}),  # of a size that is not known
    ],
)
def test_what_does_not_fit_stays(shape: tuple[int, ...], size: tuple[int, int], changes: dict[str, Any]) -> None:
    proto = graph(np.ones(shape), None, size, **changes)
    before = proto.SerializeToString()
    assert rewritten(proto) == 0
    assert proto.SerializeToString() == before


def test_every_new_node_names_the_module_it_came_from() -> None:
    proto = graph(np.ones((5, 5, 3, 3)), np.ones(5), (4, 4))
    rewritten(proto)
    assert proto.graph.node[-1].op_type == "LeakyRelu"
    assert all([prop.value for prop in node.metadata_props] == ["net.conv"] for node in proto.graph.node)
