"""Every command that needs no training, as typed, on a tiny run."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from outcomes import ok
from typer.main import get_command

from hflow_rt.assets import pretrained
from hflow_rt.cli.__main__ import app
from hflow_rt.export.making import ENGINES
from hflow_rt.files import sha256
from hflow_rt.manifest import read_manifest

Command = Callable[..., Any]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
R = 16


# help


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "eval"])  # a group; test_evaluate has its own
def test_help_shows_an_example(hflow: Command, command: str) -> None:
    text = ok(hflow(command, "--help")).out
    assert re.search(rf"Example: hflow-rt {command}\b", text)
    assert "[[" not in text


def test_help_lists_every_command(hflow: Command) -> None:
    text = ok(hflow("--help")).out
    listed = re.findall(r"^\W{1,2}(\w+)\b", text, re.MULTILINE)
    assert set(COMMANDS) <= set(listed)
    first = ["demo", "dataset", "train", "import", "export"]  # in the order in which they are used
    assert [name for name in listed if name in first] == first
    assert hflow("-h").out == text
    bare = hflow()
    assert "Usage: hflow-rt" in bare.out + bare.err


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(python: Command, arguments: list[str]) -> None:
    code = """
import sys
from hflow_rt.cli.__main__ import main
try:
    main()
finally:
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "PIL", "av", "accelerate", "tensorboard"} & sys.modules.keys()
    print("imported:", sorted(heavy), file=sys.stderr)
"""
    result = ok(python(code, *arguments))
    assert "Usage: hflow-rt" in result.out
    assert result.err == "imported: []\n"


# which model


def test_without_a_path_the_latest_run_is_used(hflow: Command, run: Path, tmp_path: Path) -> None:
    result = ok(hflow("sample", "-n", 1))
    assert f"from {run}/bundle on onnxruntime CPUExecutionProvider" in result.err
    assert Path("samples.png").is_file()
    assert f"{run}: hflow, " in ok(hflow("info")).out


@pytest.mark.parametrize(
    "arguments", [["sample", "-n", "1"], ["interpolate", "--frames", "2"], ["seeds", "3"], ["info"]]
)
def test_before_any_run_the_model_that_ships_is_used(
    hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = read_manifest(pretrained())
    result = ok(hflow(*arguments))
    assert result.err.startswith("no run under ./runs: this is ihdm-emoji, the bundled model\n")
    assert arguments[0] == "info" or f"ihdm 64x64 from {pretrained()} on onnxruntime" in result.err
    assert read_manifest(pretrained()) == before
    quiet = ok(hflow(*arguments, "--json"))
    assert quiet.err == ""


@pytest.mark.parametrize("command", [["export"], ["train", "--resume"]])
def test_before_any_run_one_line_says_how_to_get_one(
    hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = hflow(*command)
    assert result.code == 1
    assert result.out == ""
    expected = "error: no trained run under runs/; train one with 'hflow-rt train' or see it all with 'hflow-rt demo'\n"
    assert result.err == expected
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_not_exported(hflow: Command, run: Path) -> None:
    for path in (run / "bundle").iterdir():
        path.unlink()
    result = hflow("sample")
    assert result.code == 1
    assert result.err == f"error: {run} has no exported bundle; run 'hflow-rt export {run}' first\n"


def test_the_next_command_names_the_model_again(hflow: Command, run: Path, photo: Command) -> None:
    model = run / "bundle"
    assert f"hflow-rt interpolate --model {model} " in ok(hflow("sample", model, "-n", 1)).out
    assert "hflow-rt interpolate -o" in ok(hflow("sample", "-n", 1)).out
    encoded = ok(hflow("encode", photo("a.png"), "--model", model))
    assert f"next: hflow-rt decode latents.safetensors --model {model} -o decoded.png" in encoded.out


# export


@pytest.mark.slow
def test_export(hflow: Command, run: Path) -> None:
    before = read_manifest(run / "bundle")
    result = ok(hflow("export", "--engine", "onnx", "--route", "inverse"))
    assert re.search(rf"{run}/bundle/inverse\.onnx: \d+ nodes, 0\.\d MB", result.out)
    assert re.search(r"inverse log_prob +\S+e-\d\d +\d+% .*\S+e-\d\d +\d+%  +\S+e-\d\d", result.out)
    assert "verified: the engines are the model\nnext: hflow-rt sample" in result.out
    assert "writing inverse.onnx" in result.err
    manifest = read_manifest(run / "bundle")
    assert manifest.verified
    assert list(manifest.graphs) == ["inverse"]
    assert manifest.checkpoint == before.checkpoint
    # the same graph, whoever wrote it and when
    assert manifest.graphs["inverse"] == before.graphs["inverse"]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_export_a_model_file_as_json(hflow: Command, run: Path, photo: Command) -> None:
    model = (run / "model.safetensors").rename("mine.safetensors")
    photo("proof/a.png", 20, 30)
    result = ok(hflow("export", model, "--route", "inverse", "-o", "out/b", "--images", "proof", "--json"))
    report = json.loads(result.out)
    assert report["bundle"] == "out/b"
    assert report["graphs"] == ["inverse"]
    assert report["verified"] is True
    assert report["parity"]["passed"] is True
    assert result.err == ""
    assert read_manifest(Path("out/b")).checkpoint["sha256"] == sha256(model)


# check


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_check_passes(hflow: Command, run: Path, backend: str) -> None:
    result = ok(hflow("check", "--backend", backend, "--device", "cpu"))
    assert f"{run}/bundle on {'onnxruntime CPU' if backend == 'onnx' else 'torch cpu'}" in result.out
    for line in ("forward image", "inverse log_prob", "inverse bits/dim", "image round trip"):
        assert line in result.out
    assert "verified: the engines are the model\nnext: hflow-rt sample\n" in result.out


def test_check_says_no_after_tampering_and_yes_after_repair(hflow: Command, run: Path, photo: Command) -> None:
    photo("a.png")
    engine, manifest = run / "bundle" / "forward.onnx", run / "bundle" / "manifest.json"
    whole = engine.read_bytes(), manifest.read_text()
    graph = onnx.load(engine)
    weight = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] == 8)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[np.abs(values).argmax()] *= 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, engine)
    described = json.loads(manifest.read_text())  # whoever exchanges an engine can also mend its hash
    described["files"]["forward.onnx"] = {"sha256": sha256(engine), "bytes": engine.stat().st_size}
    manifest.write_text(json.dumps(described))

    result = hflow("check", "--images", "a.png")
    assert result.code == 1
    assert "NOT VERIFIED" in result.out
    assert result.err.splitlines()[-1].startswith(
        "error: the engines differ from the reference, the bundle is marked unverified: "
    )
    assert "forward.image: error rms" in result.err
    assert not read_manifest(run / "bundle").verified
    assert "UNVERIFIED" in hflow("info").out
    sampled = ok(hflow("sample", "-n", 1, "--json"))
    assert (
        f"warning: this bundle is unverified (parity failed or never ran); see 'hflow-rt check {run}/bundle'"
        in sampled.err
    )

    engine.write_bytes(whole[0])
    described["files"] = json.loads(whole[1])["files"]
    manifest.write_text(json.dumps(described | {"verified": False}))
    report = json.loads(ok(hflow("check", "--json")).out)
    assert report["passed"] is True
    assert report["failures"] == []
    assert read_manifest(run / "bundle").verified


# info, doctor


def test_info_of_a_run(hflow: Command, run: Path) -> None:
    text = ok(hflow("info", run)).out
    assert re.search(rf"^{run}: hflow, [\d,]+ values$", text, re.MULTILINE)
    assert f"bundle: {run}/bundle, verified, fp32, opset 20" in text
    assert "latent end1: 6x1x1, prior std 1.0" in text
    manifest = read_manifest(run / "bundle")
    for name, graph in manifest.graphs.items():
        assert re.search(rf"  {name}: {sum(graph.operators.values())} nodes, \d+\.\d MB, batch 1\.\.64", text)
        assert ", ".join(f"{count} {operator}" for operator, count in graph.operators.items()) in text


@pytest.mark.parametrize("what", ["", "bundle", "model.safetensors"])
def test_info_as_json(hflow: Command, run: Path, what: str) -> None:
    found = json.loads(ok(hflow("info", run / what, "--json")).out)
    assert found["path"] == str(run / what)
    assert found["model"]["family"] == "hflow"
    assert found["model"]["config"]["levels"][0]["resolution"] == R
    assert found["model"]["values"] > 10_000
    assert ("bundle" in found) == (what != "model.safetensors")
    if "bundle" in found:
        assert found["bundle"]["verified"] is True
        assert found["bundle"]["graphs"]["forward"]["operators"]["Conv"] > 10


def test_info_of_a_model_file_says_to_export_it(hflow: Command, run: Path) -> None:
    assert f"next: hflow-rt export {run}/model.safetensors" in ok(hflow("info", run / "model.safetensors")).out


def test_doctor(hflow: Command) -> None:
    text = ok(hflow("doctor")).out
    assert re.search(r"onnx backend: onnxruntime [\d.]+, compiled with .*CPUExecutionProvider", text)
    assert re.search(r"torch backend: torch \d", text)
    assert "training and export: ok" in text
    found = json.loads(ok(hflow("doctor", "--json")).out)
    assert found["training and export"] == "ok"


def test_doctor_names_what_is_missing(hflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def version(package: str) -> str:
        if package == "onnxruntime":
            return "1.2.3"
        if package == "onnxruntime-gpu":
            return "1.2.3"
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    text = ok(hflow("doctor")).out
    assert "onnx backend: BROKEN: onnxruntime and onnxruntime-gpu overwrite each other" in text
    assert "torch backend: missing: pip install 'hflow-rt[train]'" in text
    assert "training and export: missing torch, onnx, onnxscript, accelerate, tensorboard: pip install" in text
    assert "mp4 video: missing av: pip install 'hflow-rt[video]'" in text


def test_doctor_survives_what_is_broken(hflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    text = ok(hflow("doctor")).out
    assert re.search(r"onnx backend: BROKEN: .*; pip install --force-reinstall --no-deps onnxruntime\n", text)
    assert re.search(r"torch backend: BROKEN: .*; pip install --force-reinstall torch\n", text)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    assert "onnx backend: BROKEN: its files were removed with another package" in ok(hflow("doctor")).out


def test_the_engines_on_offer_are_those_that_exist(hflow: Command) -> None:
    text = " ".join(hflow("export", "--help").out.split())
    assert all(engine in text for engine in ENGINES)
