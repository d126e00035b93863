"""Mixed precision is in the graph, and only in the nets: what it costs is measured and bounded."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hflow_rt.cli.graphs import print_report
from hflow_rt.errors import CheckpointError, HFlowError
from hflow_rt.export.half_weights import halve
from hflow_rt.export.judging import MIXED, failures
from hflow_rt.export.mixed_precision import to_mixed_precision
from hflow_rt.export.onnx import SharedWeights, export_graph
from hflow_rt.manifest import Manifest, read_manifest
from hflow_rt.models.family import GraphSpec, TensorSpec
from hflow_rt.runtime import load

IMAGES = np.random.default_rng(0).uniform(0, 1, (3, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def mixed(tiny_mixed: Path) -> Path:
    return tiny_mixed


def types(proto: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


@pytest.mark.parametrize("name", ["forward", "inverse", "bound"])
def test_the_nets_and_nothing_else(mixed: Path, name: str) -> None:
    proto = onnx.load(mixed / f"{name}.onnx")
    onnx.checker.check_model(proto, full_check=True)
    kinds = types(proto)
    halves, singles = set(), set()
    for node in proto.graph.node:
        module = next((p.value for p in node.metadata_props), "")
        made = kinds[node.output[0]]
        if node.op_type in ("Conv", "Gemm"):
            (halves if made == TensorProto.FLOAT16 else singles).add(module)
            assert kinds[node.input[0]] == kinds[node.input[1]] == made
        elif node.op_type not in ("Cast", "Shape") and made == TensorProto.FLOAT16:
            assert node.op_type not in ("Exp", "ReduceSum", "ReduceMean", "InstanceNormalization", "Sqrt", "Sub", "Neg")
    assert len(halves) > 40
    assert all(".net." in module or ".decoder." in module for module in halves)
    assert not any("scale_out" in module or "shift_out" in module or "_log_scale.out" in module for module in halves)
    for part in (".before.", ".after.", ".encoder.")[1 if name != "forward" else 0 : 3 if name != "forward" else 1]:
        assert any(part in module for module in singles), part
    inside = {module for module in singles if ".net." in module or ".decoder." in module}
    assert all("_out" in module or ".out" in module for module in inside)
    for tensor in (*proto.graph.input, *proto.graph.output):
        assert tensor.type.tensor_type.elem_type == TensorProto.FLOAT
    unused = {tensor.name for tensor in proto.graph.initializer} - {i for node in proto.graph.node for i in node.input}
    assert not unused


def test_the_manifest_says_so(mixed: Path) -> None:
    manifest = read_manifest(mixed)
    assert manifest.precision == "mixed"
    assert manifest.parity is not None
    assert manifest.parity["mixed"] == MIXED
    session = load(mixed)
    assert session.precision == "mixed"
    assert load(mixed, "torch").precision == "fp32"


def test_what_it_costs(mixed: Path, tiny_run: Path) -> None:
    exact, session = load(tiny_run), load(mixed)
    image, reference = session.sample(16, 1.0), exact.sample(16, 1.0)
    error = np.abs(image - reference)
    assert 1e-6 < error.max() < 0.02  # float16 did compute
    encoded, expected = session.inverse(IMAGES), exact.inverse(IMAGES)
    bits = np.abs(session.bits_per_dim(encoded.log_prob) - exact.bits_per_dim(expected.log_prob))
    assert bits.max() < MIXED["bits_per_dim"]
    back = session.forward(encoded.latents)  # its own inverse, to nearly the digits of the state
    assert -10 * np.log10(np.square(back - IMAGES).mean()) > MIXED["round_trip_psnr_db"]


def test_the_table_shows_what_was_allowed(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(_manifest_report(mixed))
    text = capsys.readouterr().out
    assert re.search(
        r"^  forward image +[\d.e-]+ +[\d.e-]+ +[\d.e-]+ +\d+% +[\d.e-]+  +\d+ dB of 50$", text, re.MULTILINE
    )
    assert re.search(r"^  inverse bits/dim +[\d.e-]+ +\d+%$", text, re.MULTILINE)
    assert re.search(r"^  image round trip .* \d+ dB of 60$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100


def _manifest_report(mixed: Path) -> Any:
    manifest: Manifest = read_manifest(mixed)
    return copy.deepcopy(manifest.parity)


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda r: r["graphs"]["forward"][0]["outputs"]["image"].update(psnr_db=49.0), "49.0 dB below 50"),
        (lambda r: r["graphs"]["inverse"][0].update(bits_per_dim_difference=0.006), "bits/dim differ by 0.006"),
        (lambda r: r["graphs"]["inverse"][0].update(bits_per_dim_difference=float("nan")), "bits/dim differ by nan"),
        (lambda r: r["round_trip"][0].update(psnr_db=59.0), "59.0 dB below 60"),
        (lambda r: r["pooled"]["inverse"]["z1"].update(max=100.0), "inverse.z1: error max 100 above"),
        (lambda r: r["pooled"]["forward"]["image"].update(nan=2), "2 NaN"),
    ],
)
def test_each_bound_can_fail(mixed: Path, harm: Any, text: str) -> None:
    report = _manifest_report(mixed)
    assert failures(report) == []
    harm(report)
    assert text in "; ".join(failures(report))


# the pass itself


def graph(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], output: str = "y") -> onnx.ModelProto:
    """A graph from x `[n, 4, 8, 8]` to `output` of the same shape."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, 8, 8]) for name in ("x", output))
    tensors = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )


def node(operator: str, inputs: list[str], output: str, module: str, **attributes: Any) -> onnx.NodeProto:
    made = helper.make_node(operator, inputs, [output], output, **attributes)
    entry = made.metadata_props.add()
    entry.key, entry.value = "module", module
    return made


WEIGHT = np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype(np.float32)


def test_a_net_that_is_an_output_and_a_reader_at_once() -> None:
    """Constants that both precisions read are there in both; an output of a net is cast, and read where it is made."""
    onnxruntime = pytest.importorskip("onnxruntime")
    nodes = [
        node("Conv", ["x", "w"], "a", "m.net.one"),
        node("Conv", ["a", "w"], "y", "m.net.two"),
        node("Exp", ["y"], "e", "m.net.three"),
        node("Conv", ["y", "w"], "b", "m.state"),
        node("Mul", ["e", "b"], "z", "m"),
    ]
    proto = graph(nodes, {"w": WEIGHT})
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4, 8, 8]))
    plain = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert to_mixed_precision(proto, ["*.net.*"]) == 2
    onnx.checker.check_model(proto, full_check=True)
    kinds = types(proto)
    assert kinds["a"] == TensorProto.FLOAT16
    assert kinds["e"] == kinds["b"] == kinds["y"] == kinds["z"] == TensorProto.FLOAT
    assert {tensor.data_type for tensor in proto.graph.initializer} == {TensorProto.FLOAT, TensorProto.FLOAT16}
    x = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)
    found = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for a, b in zip(found.run(["y", "z"], {"x": x}), plain.run(["y", "z"], {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())
        assert not np.array_equal(a, b)


def test_statistics_stay() -> None:
    """Norms spelled out, as large images have them: whatever follows a sum over pixels does not round it."""
    nodes = [
        node("Conv", ["x", "w"], "a", "m.net.one"),
        node("ReduceMean", ["a", "axes"], "mean", "m.net.norm"),
        node("Sub", ["a", "mean"], "centred", "m.net.norm"),
        node("Mul", ["centred", "centred"], "square", "m.net.norm"),
        node("ReduceMean", ["square", "axes"], "variance", "m.net.norm"),
        node("Sqrt", ["variance"], "std", "m.net.norm"),
        node("Div", ["centred", "std"], "normed", "m.net.norm"),
        node("Conv", ["normed", "w"], "y", "m.net.two"),
    ]
    proto = graph(nodes, {"w": WEIGHT, "axes": np.array([2, 3], np.int64)})
    assert to_mixed_precision(proto, ["*.net.*"]) == 2
    kinds = types(proto)
    assert {kinds[name] for name in ("mean", "centred", "square", "variance", "std", "normed")} == {TensorProto.FLOAT}


def test_what_stays_can_be_kept_in_half_the_bytes() -> None:
    """Half-precision weights of layers outside the nets, after `mix` took those inside; `a` is of both."""
    weight = np.random.default_rng(2).standard_normal((16, 4, 3, 3)).astype(np.float16).astype(np.float32)
    nodes = [
        node("Conv", ["x", "a"], "inner", "m.net.one", pads=[1, 1, 1, 1]),
        node("Conv", ["x", "a"], "outer", "m.state", pads=[1, 1, 1, 1]),
        node("Add", ["inner", "outer"], "both", "m.state"),
        node("Conv", ["both", "b"], "y", "m.state", pads=[1, 1, 1, 1]),
    ]
    proto = graph(nodes, {"a": weight, "b": weight.transpose(1, 0, 2, 3).copy()})
    assert to_mixed_precision(proto, ["*.net.*"]) == 1
    assert halve(proto, [1.0]) == 2
    onnx.checker.check_model(proto, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert kinds["a.half"] == kinds["a.float16"] == kinds["b.half"] == TensorProto.FLOAT16
    assert types(proto)["y"] == TensorProto.FLOAT


def test_weights_beyond_half_precision() -> None:
    proto = graph([node("Conv", ["x", "w"], "y", "m.net.one")], {"w": WEIGHT * 1e6})
    with pytest.raises(CheckpointError, match=r"w exceeds the range of half precision .* --precision fp32"):
        to_mixed_precision(proto, ["*.net.*"])


def test_a_family_without_nets(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Plain(torch.nn.Module):
        def forward(self, x: Any) -> tuple[Any]:
            return (x * 2,)

    spec = GraphSpec(
        "forward", Plain(), Plain(), (TensorSpec("x", (4,), "latent"),), (TensorSpec("image", (4,), "image"),)
    )
    with pytest.raises(HFlowError, match="has no nets to compute in half precision; export with --precision fp32"):
        export_graph(spec, tmp_path / "g.onnx", {}, SharedWeights(tmp_path / "weights.bin"), precision="mixed")
