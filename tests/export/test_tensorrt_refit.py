"""Other weights for a plan, and the layers of an engine: against a machine that only seems to have a GPU."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hflow_rt.errors import BackendUnavailable, BundleError, ConfigError, EngineMismatch
from hflow_rt.export import tensorrt as module
from hflow_rt.export import tensorrt_build, tensorrt_engine
from hflow_rt.export.tensorrt import add_engines, refit_engines, refittable
from hflow_rt.export.tensorrt_build import BuildRequest, difference, prepared
from hflow_rt.files import sha256
from hflow_rt.manifest import MANIFEST, BundledFile, Engines, Plan, graph_sha256, read_manifest
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.engines import tensorrt as runtime
from hflow_rt.runtime.engines.cuda import Gpu

pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parent.parent / "runtime" / "engines"))
from fake_tensorrt import FakeCuda, FakeTensorRT

ADA = Gpu(0, "NVIDIA GeForce RTX 4090", "8.9", 24 << 30)
VERSION = "11.4.0.106"
LAYERS = [
    {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "image", "Dimensions": [-1, 3, 16, 16], "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [{"Name": "x", "Dimensions": [-1, 6, 16, 16], "Format/Datatype": "Half"}],
        "Metadata": "[ONNX Layer: node_a]\x1e[ONNX Layer: node_b]\x1f[ONNX Layer: elsewhere]",
    },
    {"Name": "shape", "LayerType": "shape_call", "Outputs": []},
    "only a name",
]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for place in (module, tensorrt_engine, runtime):
        monkeypatch.setattr(place, "chosen_gpu", lambda: ADA)
        if hasattr(place, "Cuda"):
            monkeypatch.setattr(place, "Cuda", lambda gpu: fake)
    return fake


@pytest.fixture
def old(tiny_run: Path, tmp_path: Path) -> Bundle:
    """The tiny bundle with refittable plans of TensorRT, which say no more than what they are of."""
    bundle = find_bundle(shutil.copytree(tiny_run / "bundle", tmp_path / "old"))
    manifest, plans, files = bundle.manifest, {}, dict(bundle.manifest.files)
    for name in ("forward", "inverse", "timing"):
        for kind, content in ((".plan", name), (".layers.jsonl", ""), (".cache", "timings")):
            path = bundle.path / "trt" / "KEY" / (name + kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            files[f"trt/KEY/{path.name}"] = BundledFile(sha256=sha256(path), bytes=path.stat().st_size)
        if name in manifest.graphs:
            place = f"trt/KEY/{name}"
            digest = graph_sha256(manifest, name)
            plans[name] = Plan(file=f"{place}.plan", layers=f"{place}.layers.jsonl", onnx=digest, types={}, seconds=1)
    engines = Engines(
        flavor="tensorrt", version=VERSION, gpu=ADA.name, capabilities=("8.9",), batch=(1, 2, 4), refittable=True,
        plans=plans, timing_cache="trt/KEY/timing.cache", verified=True, parity={"passed": True},
    )  # fmt: skip
    return changed(bundle, files=files, engines={"KEY": engines})


def changed(bundle: Bundle, **update: Any) -> Bundle:
    manifest = bundle.manifest.model_copy(update=update)
    (bundle.path / MANIFEST).write_text(manifest.dump())
    return Bundle(bundle.path, manifest)


def rewritten(bundle: Bundle, change: Callable[[onnx.ModelProto], Any]) -> Bundle:
    """The bundle with both of its graphs changed, and their constants inside."""
    files = dict(bundle.manifest.files)
    for name in ("forward", "inverse"):
        proto = onnx.load(str(bundle.path / f"{name}.onnx"))
        change(proto)
        path = bundle.path / f"{name}.onnx"
        path.write_bytes(proto.SerializeToString())
        files[path.name] = BundledFile(sha256=sha256(path), bytes=path.stat().st_size)
    return changed(bundle, files=files)


def scaled(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 4:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), tensor.name))


@pytest.fixture
def new(tiny_run: Path, tmp_path: Path) -> Bundle:
    """The tiny bundle with other weights and no plans."""
    return rewritten(find_bundle(shutil.copytree(tiny_run / "bundle", tmp_path / "new")), scaled)


@pytest.fixture
def api(old: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """TensorRT, and its builder's process played by this one."""
    fake = FakeTensorRT(old, cuda, VERSION)
    fake.layers = LAYERS
    monkeypatch.setitem(sys.modules, "tensorrt", fake)

    def run(request: BuildRequest, failure: str, detail: Any, hint: str = "") -> dict[str, Any]:
        try:
            assert request.old is not None
            return tensorrt_build._refit(request, request.old)
        except tensorrt_engine.EngineError as error:
            raise BundleError(f"{failure}: {error}; {hint}") from error

    monkeypatch.setattr(module, "_run", run)
    return fake


def files(bundle: Bundle) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(bundle.path.rglob("*")) if path.is_file()}


def test_new_weights(old: Bundle, new: Bundle, api: FakeTensorRT, cuda: FakeCuda) -> None:
    """A plan with other weights runs as the graph that has them."""
    before, said = files(old), []
    key = refittable(old)
    assert key == "KEY"
    assert not cuda.calls  # nothing is loaded to find that out
    bundle, found = refit_engines(new, old, key, said.append)
    assert files(old) == before
    assert said == ["giving forward.plan the new weights", "giving inverse.plan the new weights"]
    steps = [
        "Runtime", "deserialize_cuda_engine", "Refitter", "OnnxParserRefitter", "refit_from_bytes",
        "get_missing_weights", "refit_cuda_engine", "serialize_with_config", "create_engine_inspector",
    ]  # fmt: skip
    assert cuda.names() == steps * 2
    assert api.flags == ["-exclude", "+include"] * 2
    assert api.graphs[0] == prepared(new.path / "forward.onnx").SerializeToString()

    assert bundle.manifest == read_manifest(new.path)
    engines = bundle.manifest.engines[found]
    assert found.startswith(f"tensorrt-{VERSION}-nvidia-geforce-rtx-4090-sm89-fp32-refit-b1-2-4-")
    assert (engines.verified, engines.parity, engines.refittable) == (False, None, True)
    assert bundle.file(engines.timing_cache or "").read_text() == "timings"
    for name, plan in engines.plans.items():
        assert plan.onnx == graph_sha256(bundle.manifest, name)
        assert (plan.layers_of, plan.refitted) == ("engine", True)
        assert bundle.file(plan.file).read_text().startswith(f"{name}@")
        assert bundle.file(plan.layers).stat().st_size > 0
    assert refittable(bundle) == found  # and once more

    session = load(new.path, "trt")
    assert not session.verified
    expected, other = (load(path, "onnx", "cpu").sample(3, 0.7) for path in (new.path, old.path))
    np.testing.assert_allclose(session.sample(3, 0.7), expected, atol=1e-5)
    assert np.abs(expected - other).max() > 1e-3


@pytest.mark.parametrize(
    ("refused", "text"),
    [
        ("deserialize", "it refuses forward.plan: magic tag does not match"),
        ("refittable", "the plan was not built with --refit"),
        ("missing", "the graph has no weights for weight0, weight1, weight2, weight3, weight4 and 2 more"),
        ("weights", "it does not take the weights: unsupported node"),
        ("refit", "it cannot refit the engine: out of memory"),
        ("serialize", "it cannot write the refitted engine: it gives no reason"),
    ],
)
def test_refusals_of_tensorrt(
    old: Bundle, new: Bundle, api: FakeTensorRT, cuda: FakeCuda, refused: str, text: str
) -> None:
    before = files(new)
    api.refuse.add(refused)
    with pytest.raises(BundleError) as caught:
        refit_engines(new, old, "KEY")
    failed = f"TensorRT {VERSION} cannot refit {old.path}/trt/KEY/forward.plan"
    assert str(caught.value) == f"{failed}: {text}; omit --update-weights to build anew"
    assert files(new) == before
    assert not (new.path / "trt").exists()
    if refused in ("refittable", "missing", "weights"):
        assert "refit_cuda_engine" not in cuda.names()


def fewer(proto: onnx.ModelProto) -> None:
    del proto.graph.node[-1:]


def steeper(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "LeakyRelu")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("alpha", 0.5))


def wider(proto: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.concatenate([values, values]), tensor.name))


def clipped(proto: onnx.ModelProto) -> None:
    limits = {name for node in proto.graph.node if node.op_type == "Clip" for name in node.input[1:] if name}
    for tensor in proto.graph.initializer:
        if tensor.name in limits:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(2), tensor.name))


def reshaped(proto: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.INT64)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))


def renamed(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 99


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (fewer, "and it has "),
        (steeper, r"\(LeakyRelu\) is another"),
        (wider, "another shape, type or fixed value"),
        (clipped, "another shape, type or fixed value"),
        (reshaped, "another shape, type or fixed value"),
        (renamed, "its inputs or outputs are others"),
    ],
)
def test_graphs_that_differ_in_more(
    old: Bundle, new: Bundle, api: FakeTensorRT, cuda: FakeCuda, change: Callable[[onnx.ModelProto], Any], text: str
) -> None:
    with pytest.raises(EngineMismatch, match=text) as caught:
        refit_engines(rewritten(new, change), old, "KEY")
    assert str(caught.value).startswith(f"forward must be the graph of {old.path} but for its weights, and ")
    assert "\n" not in str(caught.value)
    assert not cuda.calls


def test_notes_are_no_difference(old: Bundle, new: Bundle) -> None:
    def note(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].metadata_props.add(key="module", value="other")
        proto.graph.node[0].doc_string = "note"

    before = prepared(old.path / "forward.onnx")
    assert difference(before, prepared(rewritten(new, note).path / "forward.onnx")) == ""


def test_graphs_that_are_missing(old: Bundle, new: Bundle, api: FakeTensorRT) -> None:
    fewer = {name: graph for name, graph in new.manifest.graphs.items() if name != "inverse"}
    with pytest.raises(EngineMismatch, match="lack inverse; omit --update-weights to build anew"):
        refit_engines(changed(new, graphs=fewer), old, "KEY")


# before anything is loaded


def test_without_a_gpu(old: Bundle, api: FakeTensorRT, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """No runtime is ever made: it would take the process down."""
    monkeypatch.setattr(module, "chosen_gpu", lambda: None)
    with pytest.raises(BackendUnavailable, match=r"needs an NVIDIA GPU, and none .* or omit --update-weights"):
        refittable(old)
    monkeypatch.setattr(tensorrt_engine, "chosen_gpu", lambda: None)
    with (
        pytest.raises(tensorrt_engine.EngineError, match="on an NVIDIA GPU only, and none was found here"),
        tensorrt_engine.loaded(api, old.path / "trt" / "KEY" / "forward.plan", None, []),
    ):
        pass
    assert not cuda.calls


def test_engines_that_will_not_do(old: Bundle, api: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = old.manifest.engines["KEY"]
    plain = changed(old, engines={"KEY": engines.model_copy(update={"refittable": False})})
    with pytest.raises(BundleError, match=r"no engines that were built with --refit, .* --flavor tensorrt --refit'"):
        refittable(plain, "tensorrt")
    monkeypatch.setattr(module, "chosen_gpu", lambda: Gpu(0, "NVIDIA H100", "9.0", 1))
    with pytest.raises(EngineMismatch, match=r"for compute capability 8\.9 and NVIDIA H100 has 9\.0; .* --refit'"):
        refittable(changed(plain, engines={"KEY": engines}))


def test_refittable_engines_are_built(old: Bundle, api: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def build(request: BuildRequest, *rest: Any) -> dict[str, Any]:
        requests.append(request)
        request.plan.write_bytes(b"plan")
        request.layers.write_text("")
        return {"types": {}, "seconds": 1, "layers_of": "engine"}

    monkeypatch.setattr(module, "_run", build)
    plain, refit = (add_engines(old, "tensorrt", batch=(2, 2, 2), refit=wanted)[1] for wanted in (False, True))
    assert [(request.refittable, request.load) for request in requests] == [(False, True)] * 4 + [(True, True)] * 4
    assert "-fp32-b2-2-2-" in plain
    assert refit == plain.replace("-fp32-", "-fp32-refit-")
    found = read_manifest(old.path).engines
    assert [found[key].refittable for key in (plain, refit)] == [False, True]


# TensorRT for RTX


def test_rtx_needs_a_gpu_to_build_them(old: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(module, "chosen_gpu", lambda: None)
    with pytest.raises(BackendUnavailable, match=r"on a machine with a GPU only, .* or omit --refit"):
        add_engines(old, "rtx", ["8.9"], refit=True)
    monkeypatch.setattr(module, "chosen_gpu", lambda: ADA)
    with pytest.raises(ConfigError, match=r"--refit is for one compute capability, not for 8\.6, 8\.9: "):
        add_engines(old, "rtx", ["8.6", "8.9"], refit=True)


def test_and_really_does(old: Bundle, tmp_path: Path) -> None:
    """The two refusals above are what the builder does; where it no longer does, they can go."""
    pytest.importorskip("tensorrt_rtx")
    if runtime.chosen_gpu() is not None:
        pytest.skip("there is a GPU here")
    graph = tmp_path / "graph.onnx"

    def built(capabilities: tuple[str, ...], refit: bool, *nodes: onnx.NodeProto) -> dict[str, Any]:
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3]) for name in ("x", "y")]
        constant = numpy_helper.from_array(np.arange(3, dtype=np.float32), "weight")
        made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [constant])
        onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), graph)
        request = BuildRequest(
            module="tensorrt_rtx", onnx=graph, plan=tmp_path / "plan", layers=tmp_path / "layers", batch=(1, 2, 4),
            capabilities=capabilities, refittable=refit,
        )  # fmt: skip
        return module._run(request, "failed", lambda text: None)

    add, relu = helper.make_node("Add", ["x", "weight"], ["y"], "add"), helper.make_node("Relu", ["x"], ["y"], "relu")
    assert built(("8.9",), False, add)["layers_of"] == "network"
    assert built(("8.9",), True, relu)["types"] == {"float": 1}  # with no weights to replace
    for capabilities in (("8.9",), ("8.6", "8.9")):
        with pytest.raises(BundleError, match=r"failed: .*(CHECK|CUDA)"):
            built(capabilities, True, add)


# layers


def test_layers_of_an_engine(api: FakeTensorRT, cuda: FakeCuda, old: Bundle, tmp_path: Path) -> None:
    modules = {"node_a": "model.a", "node_b": "model.b"}
    with tensorrt_engine.loaded(api, old.path / "trt" / "KEY" / "forward.plan", silent(), []) as engine:
        counts = tensorrt_engine.write_layers(tensorrt_engine.engine_layers(api, engine, modules), tmp_path / "layers")
    assert counts == {"untyped": 2, "half": 1}
    found = [json.loads(line) for line in (tmp_path / "layers").read_text().splitlines()]
    assert found[0] == {
        "name": "conv + relu",
        "type": "CaskConvolution",
        "module": "model.a + model.b",
        "inputs": [["float", [-1, 3, 16, 16]]],
        "outputs": [["half", [-1, 6, 16, 16]]],
    }
    assert found[1:] == [
        {"name": "shape", "type": "shape_call", "module": "", "inputs": [], "outputs": []},
        {"name": "only a name", "type": "layer", "module": "", "inputs": [], "outputs": []},
    ]


def silent() -> Any:
    return type("Logger", (), {"log": lambda self, severity, message: None})()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Float", "float"),
        ("Row major linear FP16 format", "half"),
        ("Channel major FP32 format where channel % 4 == 0", "float"),
        ("BFloat16", "bf16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Bool", "bool"),
        ("FP8", "fp8"),
        ("", "untyped"),
    ],
)
def test_number_types(text: str, kind: str) -> None:
    assert tensorrt_engine._described({"Format/Datatype": text, "Dimensions": [1]}) == [kind, [1]]
