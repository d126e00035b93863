"""TensorRT for RTX really builds the plans of a tiny model here, without a GPU; and what stops a build."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hflow_rt.errors import BackendUnavailable, BundleError, ConfigError
from hflow_rt.export import tensorrt as module
from hflow_rt.export.tensorrt import add_engines, parse_batch, parse_capabilities
from hflow_rt.export.tensorrt_build import prepared
from hflow_rt.files import sha256
from hflow_rt.manifest import read_manifest
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.engines import plans
from hflow_rt.runtime.engines.cuda import Gpu

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'hflow-rt[rtx]'")

ADA = Gpu(0, "NVIDIA GeForce RTX 4090", "8.9", 24 << 30)


@pytest.fixture
def bundle(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A copy of the tiny bundle, on a machine without a GPU."""
    monkeypatch.setattr(module, "chosen_gpu", lambda: None)
    return find_bundle(shutil.copytree(tiny_run / "bundle", tmp_path / "bundle"))


def tree(folder: Path) -> dict[str, str]:
    """Every file by its digest."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def broken(bundle: Bundle, node: onnx.NodeProto) -> Bundle:
    """The bundle with a `forward` that ends in `node`, from "before" to "image"."""
    proto = onnx.load(bundle.path / "forward.onnx", load_external_data=False)
    for other in proto.graph.node:
        other.output[:] = ["before" if name == "image" else name for name in other.output]
    entry = node.metadata_props.add()
    entry.key, entry.value = "module", "model.levels.0.invented"
    proto.graph.node.append(node)
    path = bundle.path / "forward.onnx"
    path.write_bytes(proto.SerializeToString())
    changed = bundle.manifest.files["forward.onnx"].model_copy(
        update={"sha256": sha256(path), "bytes": path.stat().st_size}
    )
    files = bundle.manifest.files | {"forward.onnx": changed}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"files": files}))


BOTH = ["forward", "inverse"]  # of four graphs, for time


def test_two_plans_and_a_manifest(bundle: Bundle) -> None:
    before, said = tree(bundle.path), []
    added, key = add_engines(bundle, "rtx", ["8.9"], graphs=BOTH, progress=said.append)
    assert added.manifest == read_manifest(bundle.path)
    digest = key.rpartition("-")[2]
    assert key == f"rtx-{rtx.__version__}-sm89-fp32-b1-16-64-{digest}"
    assert len(said) == 2
    engines = added.manifest.engines[key]
    assert list(engines.plans) == ["forward", "inverse"]
    assert (engines.flavor, engines.gpu, engines.capabilities) == ("rtx", None, ("8.9",))
    assert engines.verified is False
    assert engines.timing_cache is None  # this product has none
    after = tree(bundle.path)
    place = f"trt/{key}"
    assert after.keys() - before.keys() == {
        f"{place}/{name}.{kind}" for name in engines.plans for kind in ("plan", "layers.jsonl")
    }
    assert all(after[name] == digest for name, digest in before.items() if name != "manifest.json")
    for name, plan in engines.plans.items():
        assert added.manifest.files[plan.file].sha256 == after[plan.file]
        assert (bundle.path / plan.file).stat().st_size > 100_000
        layers = [json.loads(line) for line in (bundle.path / plan.layers).read_text().splitlines()]
        assert plan.types == {"float": len(layers)}
        assert (plan.layers_of, plan.refitted) == ("network", False)
        convolutions = [layer for layer in layers if layer["type"] == "CONVOLUTION"]
        assert len(convolutions) == bundle.manifest.graphs[name].operators["Conv"]
        assert all(layer["module"].startswith("model.") for layer in convolutions)
        assert {layer["outputs"][0][1][0] for layer in convolutions} == {-1}
    assert not list(bundle.path.rglob(".*"))


def test_one_batch_size_is_part_of_the_shapes(bundle: Bundle) -> None:
    added, key = add_engines(bundle, "rtx", ["8.6", "12.0"], (4, 4, 4), graphs=["forward"])
    assert "-sm86-sm120-fp32-b4-4-4-" in key
    plan = added.manifest.engines[key].plans["forward"]
    layers = [json.loads(line) for line in (bundle.path / plan.layers).read_text().splitlines()]
    assert {layer["outputs"][0][1][0] for layer in layers if layer["type"] == "CONVOLUTION"} == {4}


def test_mixed_precision_is_that_of_the_graph(
    tiny_mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "chosen_gpu", lambda: None)
    added, key = add_engines(find_bundle(shutil.copytree(tiny_mixed, tmp_path / "mixed")), "rtx", ["8.9"], graphs=BOTH)
    assert "-sm89-mixed-b1-16-64-" in key
    for plan in added.manifest.engines[key].plans.values():
        assert plan.types["half"] > 100
        layers = [json.loads(line) for line in (added.path / plan.layers).read_text().splitlines()]
        made = {layer["module"]: layer["outputs"][0][0] for layer in layers if layer["type"] == "CONVOLUTION"}
        assert {kind for module, kind in made.items() if ".net.conv1" in module} == {"half"}
        assert {kind for module, kind in made.items() if ".encoder." in module} <= {"float"}
        norms = [layer for layer in layers if layer["type"] == "NORMALIZATION"]
        assert {layer["outputs"][0][0] for layer in norms} == {"float"}


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "12.0", "12.1"])
def test_every_generation(bundle: Bundle, capability: str) -> None:
    """Turing, which has no float32 matrix product, too."""
    graph = "inverse" if capability == "7.5" else "end_inverse"  # the smaller, for time
    added, key = add_engines(bundle, "rtx", [capability], graphs=[graph])
    assert added.manifest.engines[key].plans[graph].types["float"] > 50


def test_several_engines_of_one_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run", lambda request, *rest: _made(request))
    one, first = add_engines(bundle, "rtx", ["8.9"], (2, 2, 2), graphs=["forward"])
    two, second = add_engines(one, "rtx", ["8.9"], (3, 3, 3), graphs=["forward"])
    assert list(two.manifest.engines) == [first, second]
    again, third = add_engines(two, "rtx", ["8.9"], (2, 2, 2), graphs=["forward"])
    assert third == first
    assert list(again.manifest.engines) == [second, first]
    for name in again.manifest.files:
        again.file(name)  # still what the manifest says


def test_a_bundle_that_changes_meanwhile(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that was written while the engines were built stays; other graphs make them worthless."""

    def build(request: Any, *rest: Any) -> dict[str, Any]:
        manifest = read_manifest(bundle.path)
        (bundle.path / "manifest.json").write_text(change(manifest).dump())
        return _made(request)

    monkeypatch.setattr(module, "_run", build)
    change = lambda manifest: manifest.model_copy(update={"verified": False})  # noqa: E731
    assert not add_engines(bundle, "rtx", ["8.9"])[0].manifest.verified
    entry = bundle.manifest.files["inverse.onnx"]
    change = lambda manifest: manifest.model_copy(  # noqa: E731
        update={"files": manifest.files | {"forward.onnx": entry}}
    )
    with pytest.raises(BundleError, match="was exported again while its engines were built; build them again"):
        add_engines(bundle, "rtx", ["8.9"])


def test_where_nobody_names_a_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(module, "_run", lambda request, *rest: built.append(request) or _made(request))
    add_engines(bundle, "rtx")
    assert built[0].capabilities == ("8.0", "8.6", "8.9", "12.0")
    monkeypatch.setattr(module, "chosen_gpu", lambda: ADA)
    _, key = add_engines(bundle, "rtx")
    assert built[-1].capabilities == ("8.9",)
    assert "4090" not in key  # the plan runs on others of that generation
    hopper = Gpu(0, "NVIDIA H100", "9.0", 80 << 30)
    monkeypatch.setattr(module, "chosen_gpu", lambda: hopper)
    with pytest.raises(
        ConfigError, match=r"builds for compute capabilities 7\.5, .*, not for 9\.0 of NVIDIA H100; use"
    ):
        add_engines(bundle, "rtx")
    with pytest.raises(ConfigError, match=r"not for 8\.7; choose among these"):
        add_engines(bundle, "rtx", ["8.7"])


def _made(request: Any, seconds: float = 1.0) -> dict[str, Any]:
    request.plan.write_bytes(b"plan")
    request.layers.write_text("")
    if request.timing_cache is not None:
        old = request.timing_cache.read_bytes() if request.timing_cache.is_file() else b""
        request.timing_cache.write_bytes(old + b"timings")
    return {"types": {}, "seconds": seconds}


def test_tensorrt_builds_for_the_gpu_here(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TensorRT itself, whose libraries no package index has, only what is asked of it can be seen here."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.16.1.11", __spec__=object()))
    with pytest.raises(BackendUnavailable, match=r"builds on the GPU .* there is none here; .* --flavor rtx"):
        add_engines(bundle, "tensorrt")
    requests = []
    monkeypatch.setattr(module, "_run", lambda request, *rest: requests.append(request) or _made(request))
    monkeypatch.setattr(module, "chosen_gpu", lambda: ADA)
    with pytest.raises(ConfigError, match=r"for the GPU here, .*4090 with compute capability 8\.9, not for 8\.6, 8\.9"):
        add_engines(bundle, "tensorrt", ["8.6", "8.9"])
    one, key = add_engines(bundle, "tensorrt", workspace=512, graphs=BOTH)
    assert key.startswith("tensorrt-10.16.1.11-nvidia-geforce-rtx-4090-sm89-fp32-b1-16-64-")
    assert (requests[0].module, requests[0].capabilities, requests[0].workspace) == ("tensorrt", None, 512)
    engines = one.manifest.engines[key]
    assert (engines.gpu, engines.timing_cache) == (ADA.name, f"trt/{key}/timing.cache")
    # its timings start those of the next engines for this GPU and version, and of no other
    assert one.file(engines.timing_cache).read_bytes() == b"timings" * 2
    two, key = add_engines(one, "tensorrt", batch=(2, 2, 2), graphs=BOTH)
    assert two.file(two.manifest.engines[key].timing_cache).read_bytes() == b"timings" * 4
    monkeypatch.setattr(module, "chosen_gpu", lambda: Gpu(0, "NVIDIA H100", "9.0", 80 << 30))
    three, key = add_engines(two, "tensorrt", graphs=BOTH)
    assert three.file(three.manifest.engines[key].timing_cache).read_bytes() == b"timings" * 2


def test_which_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.0", __spec__=object()))
    monkeypatch.setattr(plans, "installed", lambda: ["tensorrt", "rtx"])
    assert plans.product().flavor == "rtx"  # without a GPU only this one builds
    assert plans.product(gpu=ADA).flavor == "tensorrt"
    monkeypatch.setattr(plans, "installed", lambda: ["tensorrt"])
    assert plans.product().title == "TensorRT 11.0"
    monkeypatch.setattr(plans, "installed", lambda: [])
    with pytest.raises(BackendUnavailable, match=r"hflow-rt\[rtx\].*hflow-rt\[trt\].*neither is installed"):
        plans.product()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=r"TensorRT is missing or incomplete .* pip install 'hflow-rt\[trt\]'"):
        plans.product("tensorrt")


@pytest.mark.slow
def test_a_model_of_a_real_size(tmp_path: Path) -> None:
    """In mixed precision, of one batch, for several GPUs together; the test after this is of the other choices."""
    from hflow_rt.assets import pretrained
    from hflow_rt.export.mixed_precision import to_mixed_precision
    from hflow_rt.models.checkpoint import load_model

    spec = load_model(pretrained("hflow-emoji") / "model.safetensors").graphs()["forward"]
    proto = prepared(pretrained("hflow-emoji") / "forward.onnx")
    assert to_mixed_precision(proto, spec.nets, spec.heads) > 100
    onnx.save(proto, tmp_path / "mixed.onnx")
    request = module.BuildRequest(
        module="tensorrt_rtx",
        onnx=tmp_path / "mixed.onnx",
        plan=tmp_path / "plan",
        layers=tmp_path / "layers",
        batch=(4, 4, 4),
        capabilities=("8.0", "8.6", "8.9", "12.0"),
    )
    found = module._run(request, "mixed", lambda text: None)
    assert min(found["types"]["float"], found["types"]["half"]) > 100
    assert request.plan.stat().st_size > 1_000_000


@pytest.mark.slow
def test_the_model_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constants are half-precision numbers times a scale, in a file of their own."""
    from hflow_rt.assets import pretrained

    monkeypatch.setattr(module, "chosen_gpu", lambda: None)
    bundle = find_bundle(shutil.copytree(pretrained("hflow-emoji"), tmp_path / "bundle"))
    added, key = add_engines(bundle, "rtx", ["8.9"], graphs=["inverse"])
    plan = added.manifest.engines[key].plans["inverse"]
    assert plan.types.keys() == {"float"}
    layers = [json.loads(line) for line in (added.path / plan.layers).read_text().splitlines()]
    counts = bundle.manifest.graphs["inverse"].operators
    assert sum(layer["type"] == "CONVOLUTION" for layer in layers) == counts["Conv"]
    assert sum(layer["type"] == "CAST" for layer in layers) < counts["Cast"] / 10


# what stops a build


def test_an_operator_that_it_does_not_know(bundle: Bundle) -> None:
    node = helper.make_node("Foo", ["before"], ["image"], "node_foo", domain="nowhere")
    before = tree(bundle.path)
    with pytest.raises(BundleError) as caught:
        add_engines(broken(bundle, node), "rtx", ["8.9"])
    message = str(caught.value)
    assert (
        f"cannot build {bundle.path}/forward.onnx: its parser refuses node node_foo (Foo of model.levels.0" in message
    )
    assert "\n" not in message
    assert {name for name in tree(bundle.path) if name.startswith("trt")} == set()
    assert not (bundle.path / "trt").exists()
    assert before.keys() == tree(bundle.path).keys()


def test_a_process_that_crashes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(bundle.path)
    event = json.dumps({"phase": "parsing", "done": 0, "total": 1})
    code = f"import os, signal; print('{event}', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(module, "_COMMAND", [sys.executable, "-c", code])
    with pytest.raises(BundleError, match=r"its process was killed by SIGSEGV while parsing"):
        add_engines(bundle, "rtx", ["8.9"])
    monkeypatch.setattr(module, "_COMMAND", [sys.executable, "-c", "raise SystemExit('no more memory')"])
    with pytest.raises(BundleError, match=r"its process ended with code 1 while starting: no more memory"):
        add_engines(bundle, "rtx", ["8.9"])
    assert tree(bundle.path) == before
    assert not (bundle.path / "trt").exists()


def test_ctrl_c(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second plan is interrupted: the first goes too, and so does the process."""
    _, key = add_engines(bundle, "rtx", ["8.9"], (2, 2, 2), graphs=["forward"])
    bundle, before = find_bundle(bundle.path), tree(bundle.path)
    children = []
    popen = subprocess.Popen

    def started(*arguments: Any, **options: Any) -> Any:
        children.append(popen(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", started)

    def interrupt(text: str) -> None:
        if text.startswith("inverse.plan: cloning"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_engines(bundle, "rtx", ["8.9"], (2, 2, 2), detail=interrupt)
    assert len(children) == 2
    assert [child.poll() for child in children] == [0, -9]
    assert tree(bundle.path) == before
    assert os.listdir(bundle.path / "trt") == [key]


def test_a_build_that_nobody_waits_for_ends(bundle: Bundle, tmp_path: Path) -> None:
    request = module.BuildRequest(
        module="tensorrt_rtx",
        onnx=bundle.graph("forward"),
        plan=tmp_path / "forward.plan",
        layers=tmp_path / "layers",
        batch=(1, 2, 4),
        capabilities=("8.9",),
    )
    with subprocess.Popen(
        module._COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request.model_dump_json().encode())
        process.stdin.close()
        process.stdout.readline()
        process.stdout.close()
        started = time.monotonic()
        assert process.wait(60) == 1
        assert time.monotonic() - started < 30
    assert not request.plan.exists()


# settings


@pytest.mark.parametrize(
    ("text", "batch"), [("1:16:64", (1, 16, 64)), ("4", (4, 4, 4)), ("2:2:2", (2, 2, 2)), ("1:1:8", (1, 1, 8))]
)
def test_batches(text: str, batch: tuple[int, int, int]) -> None:
    assert parse_batch(text) == batch


@pytest.mark.parametrize("text", ["", "1:2", "0:1:2", "4:2:8", "1:8:4", "a", "1:2:3:4", "-1:2:3", "1.5", "9" * 12])
def test_impossible_batches(text: str) -> None:
    with pytest.raises(ConfigError, match="--batch"):
        parse_batch(text)


def test_batches_beyond_the_graph(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="--batch must lie within the graphs' 1 to 64, not 1:2:65"):
        add_engines(bundle, "rtx", ["8.9"], (1, 2, 65))


def test_capabilities() -> None:
    assert parse_capabilities("12.0, 8.6,8.9,8.6") == ("8.6", "8.9", "12.0")
    for text in ("", "8", "89", "8.6,", "sm_86", "8.6;8.9", "0.5", "8.66"):
        with pytest.raises(ConfigError, match="--compute-capability must be numbers such as"):
            parse_capabilities(text)


# what the parser is given


def test_constants_are_inside_and_whole(bundle: Bundle) -> None:
    proto = prepared(bundle.path / "forward.onnx")
    assert all(not tensor.external_data for tensor in proto.graph.initializer)
    assert all(tensor.data_type != TensorProto.FLOAT16 for tensor in proto.graph.initializer)


@pytest.mark.parametrize("convolutions", [False, True])
def test_it_is_the_same_graph(convolutions: bool) -> None:
    """Of the model that ships, whose constants are half-precision numbers times a scale."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from hflow_rt.assets import pretrained

    path = pretrained("hflow-emoji") / "end_forward.onnx"
    proto = prepared(path, convolutions)
    counts = {node.op_type for node in proto.graph.node}
    assert "Cast" not in counts
    assert ("Gemm" in counts) is not convolutions
    onnx.checker.check_model(proto, full_check=True)
    rng = np.random.default_rng(0)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    results = []
    inputs = {}
    for model in (str(path), proto.SerializeToString()):
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = inputs or {
            tensor.name: rng.standard_normal((3, *tensor.shape[1:])).astype(np.float32)
            for tensor in session.get_inputs()
        }
        results.append(session.run(None, inputs))
    for found, expected in zip(*results, strict=True):
        assert np.abs(expected).max() > 0.1
        tolerance = 1e-5 if convolutions else 0  # another order of sums, or none
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
