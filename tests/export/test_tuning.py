"""Graphs for a CPU: proved like all others, and kept away from GPUs."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hflow_rt.errors import BundleError, ConfigError
from hflow_rt.export.bundle import export_bundle
from hflow_rt.export.onnx import SharedWeights, export_graph
from hflow_rt.export.rewriting import Rewrite, View, apply
from hflow_rt.export.tuning import PASSES, Stopwatch, Worth, choose_rewrites
from hflow_rt.export.winograd import winograd
from hflow_rt.models.checkpoint import build_model
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.inputs import inputs_of


def nearly_all() -> Worth:
    """Takes every rewrite, but of convolutions with their rows apart every other one, so that columns are left."""
    turns = itertools.cycle((True, False))

    def worth(view: View, rewrite: Rewrite) -> bool:
        rows = bool(rewrite.constants) and rewrite.constants[0].dims[2:] == [1, 3]
        return next(turns) if rows else True

    return worth


@pytest.fixture(scope="module")
def tuned(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the tiny run with every rewrite, but of the smallest maps, whose few tiles round too coarsely."""

    nearly = nearly_all()

    def worth(self: Stopwatch, view: View, rewrite: Rewrite) -> bool:
        small = rewrite.old[0].op_type == "Conv" and view.shape(rewrite.name)[2:] == [4, 4]
        return not small and nearly(view, rewrite)

    ramp = np.rint(np.linspace(0, 255, 16)).astype(np.float32) / np.float32(255)
    images = np.stack([np.broadcast_to(ramp, (3, 16, 16)), np.broadcast_to(ramp[:, None], (3, 16, 16))])
    folder = tmp_path_factory.mktemp("tuned") / "bundle"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stopwatch, "worth", worth)
        manifest = export_bundle(tiny_run / "model.safetensors", folder, images, tuning="cpu")
    assert manifest.verified, manifest.parity
    return folder


def test_tuned_graphs_are_the_model(tiny_run: Path, tuned: Path) -> None:
    bundle = find_bundle(tuned)
    assert bundle.manifest.tuning == "cpu"
    for name in ("forward", "inverse"):
        graph = bundle.manifest.graphs[name]
        assert graph.rewrites.keys() == PASSES.keys()
        assert "Resize" not in graph.operators
        assert graph.operators["DepthToSpace"] == graph.rewrites["winograd"]
    with load(tuned) as session, load(tiny_run) as other:
        found, expected = session.sample(3, 0.7, seed=5), other.sample(3, 0.7, seed=5)
    assert 0 < np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["forward", "inverse"])
def test_rewriting_changes_nothing_in_float64(tiny_run: Path, name: str) -> None:
    bundle = find_bundle(tiny_run)
    plain = in_double(onnx.load(str(bundle.graph(name))))
    inputs = inputs_of(bundle, name, 2, seed=3)
    feeds = {key: value.astype(np.float64) for key, value in inputs.items()}
    expected = ReferenceEvaluator(plain).run(None, feeds)
    worth = nearly_all()
    for step, found in PASSES.items():
        assert apply(plain, found, worth) > 0, step
    for one, other in zip(expected, ReferenceEvaluator(plain).run(None, feeds), strict=True):
        assert np.abs(one - other).max() < 1e-10 * max(1, np.abs(one).max())


@pytest.mark.parametrize("name", ["forward", "inverse"])
def test_nor_in_glow_with_classes(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = {
        "resolution": 16,
        "levels": 2,
        "steps": 2,
        "hidden_channels": 8,
        "edge": "ones",
        "classes": ("boot", "coat"),
    }
    model = build_model("glow", config)
    for parameter in model.parameters():
        if parameter.detach().abs().max() == 0:
            parameter.data = 0.05 * torch.randn(parameter.shape)
    graph = export_graph(model.graphs()[name], tmp_path / "g.onnx", {}, SharedWeights(tmp_path / "weights.bin"))
    plain = in_double(onnx.load(str(tmp_path / "g.onnx")))
    rng = np.random.default_rng(0)
    feeds = {tensor.name: rng.uniform(0, 1, (2, *tensor.shape)) for tensor in graph.inputs}
    expected = ReferenceEvaluator(plain).run(None, feeds)
    taken = choose_rewrites(plain, nearly_all())
    assert taken["winograd"] > 0
    assert taken["rows"] > 0
    for one, other in zip(expected, ReferenceEvaluator(plain).run(None, feeds), strict=True):
        assert np.abs(one - other).max() < 1e-10 * max(1, np.abs(one).max())


def test_the_stopwatch_asks_the_runtime_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 64, 3, 3)).astype(np.float32), "w")
    names = ["x", "y", "z"]
    options = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [helper.make_node("Conv", [a, "w"], [b], **options) for a, b in itertools.pairwise(names)]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 64, 16, 16]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    watch = Stopwatch(threads=1)
    taken = apply(proto, winograd, watch.worth)
    (gain,) = watch.gains.values()  # two convolutions of one shape
    assert taken == (2 if gain > 1.25 else 0)
    for gain, times in ((1.0, 0), (1.2, 0), (1.3, 2)):  # tiles round coarser, so they have to win by more than others
        watch = Stopwatch(threads=1)
        monkeypatch.setattr(watch, "_gain", lambda view, rewrite, gain=gain: gain)
        again = onnx.ModelProto()
        again.CopyFrom(whole)
        assert apply(again, winograd, watch.worth) == times


def in_double(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with all its numbers in float64."""
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    resized = {name for node in proto.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in proto.graph.initializer:
        if tensor.data_type == single and tensor.name not in resized:
            wide = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = double
    for node in proto.graph.node:
        assert node.op_type != "Cast"
        if node.op_type == "ConstantOfShape":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))
    return proto


def test_no_tensorrt_from_them(tuned: Path) -> None:
    from hflow_rt.export.tensorrt import add_engines

    with pytest.raises(BundleError, match="written for a CPU; export them for GPUs with --tune any"):
        add_engines(find_bundle(tuned))


def test_not_with_mixed_precision(tiny_run: Path, tmp_path: Path) -> None:
    images = np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(ConfigError, match="choose one of them"):
        export_bundle(tiny_run / "model.safetensors", tmp_path / "b", images, precision="mixed", tuning="cpu")
    assert not (tmp_path / "b").exists()
