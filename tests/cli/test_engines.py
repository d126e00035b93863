"""`export --engine trt` and what the other commands make of its engines, on a machine without a GPU."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import ok, refused

import hflow_rt
from hflow_rt.cli import engines as command
from hflow_rt.export import tensorrt as builder
from hflow_rt.files import sha256
from hflow_rt.manifest import read_manifest
from hflow_rt.models.registry import Family, family
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.engines import cuda
from hflow_rt.runtime.engines.cuda import find_gpus

Command = Callable[..., Any]

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'hflow-rt[rtx]'")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests on a machine with a GPU see none either."""

    def refuse() -> Any:
        from hflow_rt.errors import BackendUnavailable

        raise BackendUnavailable("no driver")

    monkeypatch.setattr(cuda, "_driver", refuse)
    assert find_gpus() == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Plans that are built at once, and hold nothing; the requests."""
    requests = []

    def run(request: Any, failure: str, detail: Any, hint: str = "") -> dict[str, Any]:
        requests.append(request)
        request.plan.write_bytes(b"plan")
        request.layers.write_text("")
        return {"types": {"float": 12, "half": 3}, "seconds": 1.5}

    monkeypatch.setattr(builder, "_run", run)
    return requests


def test_from_a_run_to_pictures(hflow: Command, run: Path) -> None:
    """What issue and README promise, for real: two plans, their description, one line without a GPU, ONNX beside."""
    built = ok(hflow("export", "--engine", "trt", "--compute-capability", "8.9"))
    shown = r"layers \d+ float of the network, built in \d+\.\d s"
    lines = re.findall(rf"^{run}/bundle/trt/rtx-[\w.-]+/(\w+)\.plan: \d+\.\d MB, {shown}", built.out, re.M)
    assert lines == ["forward", "inverse", "end_forward", "end_inverse"]
    assert "unverified: no GPU here can run them; there, run 'hflow-rt check --backend trt'" in built.out
    assert "next: hflow-rt sample --backend trt" in built.out
    assert "exporting" not in built.err  # the graphs that are there will do

    text = ok(hflow("info")).out
    assert re.search(r"TensorRT for RTX [\d.]+ for compute capability 8\.9, batch 1:16:64, unverified: never run", text)
    assert re.search(rf"    forward: \d+\.\d MB, {shown}", text)
    found = json.loads(ok(hflow("info", "--json")).out)["bundle"]["engines"]
    assert [engines["verified"] for engines in found.values()] == [False]

    text = ok(hflow("info", "--layers")).out
    assert re.search(r"^  layers of inverse in rtx-[\w.-]+, as the builder was given them:$", text, re.MULTILINE)
    first = r"^    convolution model\.levels\.0\.encoder\.\S+: float Bx3x16x16 -> float Bx6x16x16$"
    assert re.search(first, text, re.MULTILINE)

    for arguments in (("sample", "--std", 0.7), ("check",)):
        refused(hflow(*arguments, "--backend", "trt"), "NVIDIA GPU and none was found", "or use --backend onnx")
    refused(hflow("sample", "--backend", "trt", "--device", "cpu"), "run on a GPU only")
    ok(hflow("sample", "--backend", "onnx", "--std", 0.7))
    assert Path("samples.png").is_file()
    ok(hflow("check"))
    assert read_manifest(run / "bundle").verified


def test_python_builds_them_too(run: Path, quick: list[Any]) -> None:
    assert hflow_rt.export(run, engine="trt") == run / "bundle"
    (engines,) = read_manifest(run / "bundle").engines.values()
    assert list(engines.plans) == ["forward", "inverse", "end_forward", "end_inverse"]
    assert not engines.verified  # no GPU can run them here
    folder = hflow_rt.export(hflow_rt.pretrained("hflow-emoji"), "trt", "mine", route="forward")
    (engines,) = read_manifest(folder).engines.values()
    assert (folder, list(engines.plans)) == (Path("mine"), ["forward"])


def test_json(hflow: Command, run: Path, quick: list[Any]) -> None:
    result = ok(hflow("export", run, "--engine", "trt", "--batch", "2", "--workspace", 256, "--json"))
    found = json.loads(result.out)
    assert result.err == ""
    assert found["bundle"] == str(run / "bundle")
    assert found["batch"] == [2, 2, 2]
    assert found["verified"] is False
    assert found["plans"]["forward"]["types"] == {"float": 12, "half": 3}
    assert [request.workspace for request in quick] == [256] * 4  # into and out of the space as well


def test_a_bundle_alone(hflow: Command, run: Path, quick: list[Any]) -> None:
    """No run, no torch: a bundle that was copied to the machine with the GPU, by the command its refusals name."""
    bundle = Path(shutil.copytree(run / "bundle", "copied"))
    ok(
        hflow(
            "export",
            bundle,
            "--engine",
            "trt",
            "--flavor",
            "rtx",
            "--compute-capability",
            "8.6",
            "--route",
            "forward",
        )
    )
    manifest = find_bundle(bundle).manifest
    assert [list(engines.plans) for engines in manifest.engines.values()] == [["forward"]]
    ok(hflow("export", bundle, "--engine", "trt", "-o", "elsewhere"))
    assert len(find_bundle("elsewhere").manifest.engines) == 2
    assert len(find_bundle(bundle).manifest.engines) == 1


def test_the_model_that_ships(hflow: Command, run: Path, quick: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from hflow_rt.assets import pretrained

    before = {path.name for path in pretrained().iterdir()}
    shutil.rmtree("runs")
    result = ok(hflow("export", "--engine", "trt"))
    assert "no run under ./runs: this is ihdm-emoji, the bundled model, in runs/ihdm-emoji" in result.err
    assert find_bundle("runs/ihdm-emoji").manifest.engines
    assert {path.name for path in pretrained().iterdir()} == before
    ok(hflow("export", "--engine", "trt"))  # now that is the latest run
    assert quick[0].capabilities == ("8.0", "8.6", "8.9", "12.0")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--bound",), "lacks the graph bound"),
        (("--precision", "mixed"), "lacks mixed arithmetic"),
        (("--half",), "lacks weights in half precision"),
        (("--std", "0.5"), "lacks std 0.5"),
    ],
)
def test_graphs_that_will_not_do(
    hflow: Command,
    run: Path,
    quick: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    exported = []

    def export(source: Path, folder: Path, options: Any, quiet: bool) -> Any:
        exported.append((source, folder, options))
        return read_manifest(folder)

    monkeypatch.setattr(command, "export_graphs", export)
    ok(hflow("export", "--engine", "trt"))
    assert not exported
    assert (
        f"{run}/bundle {reason}: exporting its graphs again" in ok(hflow("export", "--engine", "trt", *arguments)).err
    )
    assert exported[0][:2] == (run / "model.safetensors", run / "bundle")


def test_graphs_of_other_weights(hflow: Command, run: Path, quick: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes() + b" ")
    monkeypatch.setattr(command, "export_graphs", lambda source, folder, *rest: read_manifest(folder))
    result = ok(hflow("export", "--engine", "trt"))
    assert f"{run}/bundle is of other weights than {run}/model.safetensors: exporting its graphs again" in result.err


def test_graphs_of_rounded_weights(hflow: Command, run: Path, quick: list[Any]) -> None:
    """Their weights are others than the run's, but the manifest knows what they were rounded from."""
    described = json.loads((run / "bundle" / "manifest.json").read_text())
    described["checkpoint"] |= {"sha256": "0" * 64, "exported_from": sha256(run / "model.safetensors")}
    described["checkpoint"]["weights"] = "float16"
    (run / "bundle" / "manifest.json").write_text(json.dumps(described))
    for arguments in ((), ("--half",)):
        assert "exporting" not in ok(hflow("export", "--engine", "trt", *arguments)).err
    assert len(quick) == 8


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--engine", "trt", "--batch", "8:4:2"), ["--batch MIN:OPT:MAX must rise from 1, not '8:4:2'"]),
        (("--engine", "trt", "--compute-capability", "ada"), ["must be numbers such as 8.6,8.9,12.0, not 'ada'"]),
        (("--engine", "trt", "--compute-capability", "9.0"), ["not for 9.0", "use TensorRT ('hflow-rt[trt]') there"]),
        (("--engine", "trt", "--flavor", "tensorrt"), ["TensorRT is missing", "pip install 'hflow-rt[trt]'"]),
        (("--engine", "trt", "--refit"), ["on a machine with a GPU only", "omit --refit"]),
        (("--engine", "trt", "--update-weights"), ["needs an NVIDIA GPU", "or omit --update-weights"]),
        (("--engine", "trt", "--update-weights", "--batch", "4"), ["give it no other option but --out"]),
        (("--engine", "trt", "--update-weights", "-o", "new"), ["there is no bundle in new to update", "with --out"]),
        (("--batch", "4"), ["are for --engine trt; add it"]),
        (("--refit",), ["are for --engine trt; add it"]),
        (("--update-weights",), ["are for --engine trt; add it"]),
        (("--engine", "openvino"), ["builds no 'openvino' engines; known: onnx, trt"]),
    ],
)
def test_what_cannot_be_built(hflow: Command, run: Path, arguments: tuple[str, ...], texts: list[str]) -> None:
    refused(hflow("export", *arguments), *texts)
    assert not (run / "bundle" / "trt").exists()


def test_doctor(hflow: Command) -> None:
    text = ok(hflow("doctor")).out
    assert re.search(r"trt backend: TensorRT for RTX [\d.]+; builds engines here, runs none: no GPU", text)


def test_a_copy_replaces_nothing(hflow: Command, run: Path, quick: list[Any], tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    arguments = ("export", str(run / "bundle"), "--engine", "trt", "--compute-capability", "8.9", "-o", str(precious))
    refused(hflow(*arguments), "exists already", "choose another --out")
    assert (precious / "thesis.txt").read_text() == "mine"
    assert not quick


# other weights


@pytest.fixture
def finetuned(run: Path) -> Path:
    """A run like `run` that was trained on: other weights rounded ones, and no bundle."""
    from hflow_rt.models.checkpoint import load_model, read_metadata, save_model

    model = load_model(run / "model.safetensors").half().float()
    path = Path("runs/finetuned")
    name = read_metadata(run / "model.safetensors")["family"]
    save_model(path / "model.safetensors", name, model, model.state_dict(), {"images": 8})
    return path


@pytest.fixture
def refitting(hflow: Command, run: Path, quick: list[Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle of `run` with refittable engines, on a machine with a GPU that runs nothing."""
    ada = cuda.Gpu(0, "NVIDIA GeForce RTX 4090", "8.9", 24 << 30)
    monkeypatch.setattr(builder, "chosen_gpu", lambda: ada)
    ok(hflow("export", "--engine", "trt", "--refit"))
    ok(hflow("export", "--engine", "trt", "--batch", "2"))
    return run / "bundle"


@pytest.fixture
def glow_run(hflow: Command, run: Path, tiny: Callable[[Family], Any]) -> Path:
    """In place of that of hflow, a tiny Glow, whose graphs are exported in a tenth of the time."""
    from hflow_rt.models.checkpoint import save_model

    shutil.rmtree(run)
    model = tiny(family("glow"))
    save_model(run / "model.safetensors", "glow", model, model.state_dict(), {"images": 0})
    ok(hflow("export", run))
    return run


def test_other_weights_for_real_graphs(
    hflow: Command, glow_run: Path, refitting: Path, finetuned: Path, quick: list[Any]
) -> None:
    """Two exports of one structure differ in nothing but weights, so that TensorRT is asked to refit."""
    before = read_manifest(refitting)
    assert "refittable" in ok(hflow("info", refitting.parent)).out
    result = ok(hflow("export", finetuned, "--engine", "trt", "--update-weights", "-o", refitting))
    assert f"the other engines of {refitting} were of the old weights: build them again" in result.err
    assert f"unverified: no GPU here can run them; there, run 'hflow-rt check {refitting} --backend trt'" in result.out
    manifest = read_manifest(refitting)
    assert manifest.verified
    assert manifest.checkpoint["sha256"] == sha256(finetuned / "model.safetensors") != before.checkpoint["sha256"]
    assert {name: graph.operators for name, graph in manifest.graphs.items()} == {
        name: graph.operators for name, graph in before.graphs.items()
    }
    ((key, engines),) = manifest.engines.items()
    assert engines.refittable
    assert key not in before.engines
    bundle = find_bundle(refitting)
    for name in manifest.files:
        bundle.file(name)
    assert not list(refitting.parent.glob(".*"))
    old = {name: refitting / plan.file for name, plan in next(iter(before.engines.values())).plans.items()}
    assert [(request.old, request.load) for request in quick[-len(old) :]] == [(path, False) for path in old.values()]
    refused(
        hflow("export", finetuned, "--engine", "trt", "--update-weights", "-o", refitting),
        f"has the weights of {finetuned}/model.safetensors already; there is nothing to update",
    )


def test_other_weights_that_tensorrt_refuses(
    hflow: Command, refitting: Path, finetuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle stays as it was, with its engines."""
    from hflow_rt.errors import BundleError

    def refuse(request: Any, failure: str, detail: Any, hint: str) -> Any:
        raise BundleError(f"{failure}: no; {hint}")

    def export(source: Path, folder: Path, options: Any, quiet: bool) -> Any:
        assert (source, options.route, options.precision) == (finetuned / "model.safetensors", "both", "fp32")
        shutil.copytree(refitting, folder)
        return read_manifest(folder)

    monkeypatch.setattr(command, "export_graphs", export)
    monkeypatch.setattr(builder, "_run", refuse)
    before = {path: sha256(path) for path in refitting.rglob("*") if path.is_file()}
    refused(
        hflow("export", finetuned, "--engine", "trt", "--update-weights", "-o", refitting, "--json"),
        f"cannot refit {refitting}/trt/rtx-",
        "no; omit --update-weights to build anew",
    )
    assert {path: sha256(path) for path in refitting.rglob("*") if path.is_file()} == before
    assert not list(refitting.parent.glob(".*"))


def test_layers_of_an_engine(hflow: Command, run: Path, quick: list[Any]) -> None:
    ok(hflow("export", "--engine", "trt"))
    described = json.loads((run / "bundle" / "manifest.json").read_text())
    for engines in described["engines"].values():
        for plan in engines["plans"].values():
            plan |= {"layers_of": "engine", "refitted": True}
    (run / "bundle" / "manifest.json").write_text(json.dumps(described))
    text = ok(hflow("info", "--layers")).out
    assert "layers 12 float, 3 half of the engine, refitted in 1.5 s" in text
    assert re.search(r"^  layers of forward in rtx-[\w.-]+, as the engine runs them:$", text, re.MULTILINE)


def test_engines_join_a_bundle_of_the_same_weights(hflow: Command, run: Path, quick: list[Any]) -> None:
    shutil.copytree(run / "bundle", "other")
    arguments = ("export", run / "bundle", "--engine", "trt", "--compute-capability", "8.9", "-o", "other")
    ok(hflow(*arguments))
    ok(hflow(*arguments[:-3], "8.6", "-o", "other"))
    assert len(read_manifest(Path("other")).engines) == 2
    assert not read_manifest(run / "bundle").engines
    described = json.loads(Path("other/manifest.json").read_text())
    described["checkpoint"]["sha256"] = "0" * 64
    Path("other/manifest.json").write_text(json.dumps(described))
    refused(hflow(*arguments), "other exists already, and a copy of", "choose another --out")
