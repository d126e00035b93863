"""`hflow_rt.export` and `hflow_rt.check`, which the commands call."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import hflow_rt
from hflow_rt.errors import BackendUnavailable, BundleError, ParityError
from hflow_rt.export import bundle as exporting
from hflow_rt.export.making import GraphOptions, wanted_graphs
from hflow_rt.manifest import read_manifest


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_run, "runs/tiny"))


def test_export_returns_the_bundle_and_keeps_what_it_was(run: Path) -> None:
    steps: list[str] = []
    folder = hflow_rt.export(str(run), out="elsewhere", route="inverse", std=["0.5"], progress=steps.append)
    assert folder == Path("elsewhere")
    assert "writing inverse.onnx" in steps
    again = read_manifest(hflow_rt.export(out="elsewhere"))  # the latest run, as it was
    assert list(again.graphs) == ["inverse"]
    assert list(again.std) == ["0.5"]
    assert again.verified


def test_a_bundle_of_a_version_that_knew_no_channels_is_exported_as_it_was(run: Path) -> None:
    """Its settings are fewer than those of its model file, and mean the same."""
    folder = run / "bundle"
    about = json.loads((folder / "manifest.json").read_text())
    assert about["config"].pop("channels") == 3
    about["std"] = ["0.25"]
    (folder / "manifest.json").write_text(json.dumps(about))
    assert read_manifest(folder).channels == 3
    options, _, _ = wanted_graphs(run / "model.safetensors", folder, GraphOptions())
    assert list(options.std or ()) == ["0.25"]
    about["config"]["channels"] = 2
    (folder / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(BundleError, match="an image has 3 channels, or 1"):
        read_manifest(folder)


def test_export_refuses(run: Path) -> None:
    with pytest.raises(BackendUnavailable, match="builds no 'coreml' engines; known: onnx, trt"):
        hflow_rt.export(run, "coreml")
    with pytest.raises(BundleError, match="was installed and must stay as it is"):
        hflow_rt.export(hflow_rt.pretrained())


def test_an_engine_that_is_not_the_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both raise, and the bundle stays, marked unverified."""
    report: dict[str, Any] = {"passed": False, "failures": ["forward image: 0.1", "b", "c", "d"]}
    monkeypatch.setattr(exporting, "run_parity", lambda *arguments, **options: report)
    for call in (lambda: hflow_rt.check(run), lambda: hflow_rt.export(run, route="forward")):
        with pytest.raises(ParityError, match=r"differ from the reference.*: forward image: 0\.1; b; c$"):
            call()
        assert not read_manifest(run / "bundle").verified
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes() + b" ")
    with (
        pytest.warns(UserWarning, match="is of other weights than runs/tiny has now") as caught,
        pytest.raises(ParityError),
    ):
        hflow_rt.check(run)
    assert caught[0].filename == __file__


def test_check(run: Path) -> None:
    before = (run / "bundle" / "manifest.json").read_text()
    report = hflow_rt.check(run / "bundle", "torch", "cpu")
    assert report["passed"]
    assert report["backend"] == "torch cpu"
    assert (run / "bundle" / "manifest.json").read_text() == before  # of the onnx engines


def test_options_as_they_are_typed() -> None:
    assert GraphOptions().filled(None).words() == ""
    asked = GraphOptions(route="forward", bound=True, std=("1", "z0=0.5"), tune="cpu")
    assert asked.filled(None).words() == " --route forward --bound --std 1 --std z0=0.5 --tune cpu"
