"""Model repositories: settings that the server's own protobuf reads, versions, what is refused; the client's words."""

import http.server
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hflow_rt
from hflow_rt.errors import BackendUnavailable, BundleError, ConfigError, DataError
from hflow_rt.export.repository import model_name, write_repository
from hflow_rt.export.serving import models_in, program, repository_for, running
from hflow_rt.files import sha256
from hflow_rt.manifest import BundledFile, Engines, Plan
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.client import Client
from hflow_rt.runtime.served import answered


def config(folder: Path) -> Any:
    """As the server reads it: a field that it does not know is an error."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.fixture
def bundle(tiny_run: Path) -> Bundle:
    return find_bundle(tiny_run)


def test_every_graph_is_a_model(bundle: Bundle, tmp_path: Path) -> None:
    found = write_repository(bundle, tmp_path)
    graphs = [f"tiny_{name}" for name in bundle.manifest.graphs]
    assert found == dict.fromkeys([*graphs, "tiny_sample"], 1)
    assert models_in(tmp_path) == sorted(found)
    for name, graph in bundle.manifest.graphs.items():
        told = config(tmp_path / f"tiny_{name}")
        assert (told.name, told.backend, told.max_batch_size) == (f"tiny_{name}", "onnxruntime", graph.batch[1])
        assert [(one.name, tuple(one.dims)) for one in told.input] == [(one.name, one.shape) for one in graph.inputs]
        assert {one.data_type for one in told.output} == {11}  # TYPE_FP32
        assert told.dynamic_batching.max_queue_delay_microseconds > 0
        (warm,) = told.model_warmup
        assert {key: tuple(value.dims) for key, value in warm.inputs.items()} == {
            one.name: one.shape for one in graph.inputs
        }
        made = tmp_path / f"tiny_{name}" / "1" / "model.onnx"
        assert sha256(made / "model.onnx") == sha256(bundle.graph(name))
        assert {path.name for path in made.iterdir()} == {"model.onnx", *graph.weights}
    (log_prob,) = (one for one in config(tmp_path / "tiny_inverse").output if one.name == "log_prob")
    assert (list(log_prob.dims), list(log_prob.reshape.shape), log_prob.HasField("reshape")) == ([1], [], True)
    sample = config(tmp_path / "tiny_sample")
    assert (sample.backend, sample.max_batch_size) == ("python", 0)
    assert all(one.optional for one in sample.input)
    inside = load(tmp_path / "tiny_sample" / "1" / "bundle", device="cpu")  # without what a session does not read
    np.testing.assert_array_equal(inside.sample(2, seed=5), load(bundle.path, device="cpu").sample(2, seed=5))
    assert (tmp_path / "tiny.manifest.json").is_file()


def test_another_export_is_another_version(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path, name="m")
    (tmp_path / "m_forward" / "7").mkdir()
    assert write_repository(bundle, tmp_path, name="m")["m_forward"] == 8
    assert write_repository(bundle, tmp_path, name="other")["other_sample"] == 1
    assert {path.name for path in (tmp_path / "m_forward").iterdir()} == {"1", "7", "8", "config.pbtxt"}
    assert not [*tmp_path.rglob(".*")]


def test_settings_that_were_changed_stay(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path, name="m")
    settings = tmp_path / "m_forward" / "config.pbtxt"
    as_written = settings.read_text()
    settings.write_text(as_written.replace("count: 1", "count: 3"))
    write_repository(bundle, tmp_path, name="m")
    assert config(tmp_path / "m_forward").instance_group[0].count == 3
    settings.write_text(as_written.replace("onnxruntime", "openvino"))
    with pytest.raises(ConfigError, match=r"was changed and is not of backend: .onnxruntime"):
        write_repository(bundle, tmp_path, name="m")
    assert not (tmp_path / "m_forward" / "3").exists()


def test_nothing_is_half_written(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository(bundle, tmp_path)
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    seen: list[list[str]] = []

    def looked(source: object, target: object) -> None:
        seen.append(sorted(path.name for path in (tmp_path / "watched").iterdir()))
        copy(source, target)

    copy = shutil.copyfile
    monkeypatch.setattr("shutil.copyfile", looked)
    (tmp_path / "watched").mkdir()
    write_repository(bundle, tmp_path / "watched", name="m")
    assert seen[0] == []  # what is being made is not there, not even under another name
    assert not any(name.startswith(".") for names in seen for name in names)
    shutil.rmtree(tmp_path / "watched")
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(DataError, match="No space left"):
        write_repository(bundle, tmp_path)
    with pytest.raises(DataError, match="No space left"):
        write_repository(bundle, tmp_path, name="new")
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before


def test_a_loop_is_served_by_a_session(many_steps: Path, tmp_path: Path) -> None:
    assert write_repository(find_bundle(many_steps), tmp_path) == dict.fromkeys(
        ("many_sample", "many_forward", "many_inverse"), 1
    )
    told = config(tmp_path / "many_inverse")
    assert (told.backend, told.max_batch_size, told.parameters["route"].string_value) == ("python", 0, "inverse")
    assert {one.name: one.optional for one in told.input} == dict.fromkeys(("control", "seed", "first"), True) | {
        "image": False
    }
    session = load(tmp_path / "many_sample" / "1" / "bundle", device="cpu")
    assert {one.name: tuple(one.dims[1:]) for one in told.output if len(one.dims) > 1} == session.input_shapes
    asked = {"seed": np.array([3], np.uint64), "count": np.array([2], np.int32), "first": np.array([1], np.uint64)}
    asked |= {"steps": np.array([2], np.int32), "control": np.array([b"delta=0.1"], object)}
    expected = session.sample(3, seed=3, steps=2, controls={"delta": 0.1})[1:]
    np.testing.assert_allclose(answered(session, "sample", asked)["image"], expected, atol=1e-6)
    with pytest.raises(DataError, match="the number of images must be at least 1"):
        answered(session, "sample", {"count": np.array([0], np.int32)})


def engines(bundle: Bundle, flavor: Any, capability: str, folder: Path) -> Bundle:
    """The bundle with engines that are none."""
    (folder / f"trt/{capability}").mkdir(parents=True)
    files = {}
    for name in ("forward", "inverse"):
        for kind in ("plan", "json"):
            path = folder / f"trt/{capability}/{name}.{kind}"
            path.write_bytes(f"{capability} {name}".encode())
            files[f"trt/{capability}/{name}.{kind}"] = BundledFile(sha256=sha256(path), bytes=path.stat().st_size)
    plans = {
        name: Plan(
            file=f"trt/{capability}/{name}.plan", layers=f"trt/{capability}/{name}.json", onnx="", types={}, seconds=1
        )
        for name in ("forward", "inverse")
    }
    made = Engines(flavor=flavor, version="10", gpu=None, capabilities=(capability,), batch=(1, 8, 32), plans=plans)
    manifest = bundle.manifest
    update = {"files": manifest.files | files, "engines": manifest.engines | {f"{flavor}-{capability}": made}}
    return Bundle(folder, manifest.model_copy(update=update))


def test_tensorrt_engines(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no TensorRT engines; build them"):
        write_repository(bundle, tmp_path / "none", "trt")
    shutil.copytree(bundle.path, tmp_path / "b")
    rtx = engines(Bundle(tmp_path / "b", bundle.manifest), "rtx", "12.0", tmp_path / "b")
    with pytest.raises(ConfigError, match="TensorRT for RTX, whose plans the server's TensorRT cannot read"):
        write_repository(rtx, tmp_path / "none", "trt")
    two = engines(engines(rtx, "tensorrt", "8.9", tmp_path / "b"), "tensorrt", "9.0", tmp_path / "b")
    (tmp_path / "b" / "manifest.json").write_text(two.manifest.dump())
    found = write_repository(two, tmp_path / "r", "trt", "m")
    assert found == {"m_forward": 1, "m_inverse": 1, "m_sample": 1}
    told = config(tmp_path / "r" / "m_forward")
    assert (told.platform, told.max_batch_size) == ("tensorrt_plan", 32)
    assert dict(told.cc_model_filenames) == {"8.9": "trt-8.9-forward.plan", "9.0": "trt-9.0-forward.plan"}
    for capability, file in told.cc_model_filenames.items():
        assert (tmp_path / "r" / "m_forward" / "1" / file).read_text() == f"{capability} forward"


def test_from_python_and_by_name(tiny_run: Path, tmp_path: Path) -> None:
    folder = hflow_rt.export(tiny_run, "triton-repo", tmp_path / "repo")
    assert models_in(folder)[0].startswith("tiny_")
    with pytest.raises(ConfigError, match="takes a bundle as it is; export with these options first"):
        hflow_rt.export(tiny_run, "triton-repo", tmp_path / "repo", half=True)
    odd = tmp_path / "my run, 2" / "bundle"
    assert model_name(Bundle(odd, find_bundle(tiny_run).manifest)) == "my-run--2"


def test_a_server_that_is_not_there(bundle: Bundle, tmp_path: Path) -> None:
    folder = repository_for(bundle, tmp_path)
    assert repository_for(bundle, tmp_path) == folder
    assert max(int(path.name) for path in (folder / "tiny_forward").glob("[0-9]")) == 1
    with pytest.raises(
        BackendUnavailable, match=r"no-such-server is not on this machine; .*docker run --rm -p 127\.0\.0\.1:80:8000"
    ):
        program("no-such-server", folder, "127.0.0.1", 80, 81)
    with pytest.raises(BundleError, match="holds no models; write them"):
        models_in(tmp_path / "nothing")
    with (
        pytest.raises(BackendUnavailable, match=r"the server ended \(3\) and said: error: no such model"),
        running(["sh", "-c", "echo error: no such model; exit 3"], "http://127.0.0.1:1/", lambda line: None),
    ):
        pass
    with (
        pytest.raises(BackendUnavailable, match="was not ready after 0 s"),
        running(["sleep", "60"], "http://127.0.0.1:1/", lambda line: None, 0.1),
    ):
        pass


def test_a_port_where_somebody_answers() -> None:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *about: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        at = f"http://127.0.0.1:{other.server_address[1]}/"
        with pytest.raises(BackendUnavailable, match="somebody else answers"), running(["sleep", "9"], at, print):
            pass


def test_a_client_without_a_server() -> None:
    pytest.importorskip("tritonclient")
    with pytest.raises(BackendUnavailable, match=r"the server at 127\.0\.0\.1:1 does not answer"):
        Client("127.0.0.1:1", "m", timeout=5)
