"""`export` onto a bundle that is there: what was not said stays as it was, in the same folder."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import ok

import hflow_rt.export.bundle as export_module
from hflow_rt.manifest import Manifest, read_manifest

Command = Callable[..., Any]
ENGINES = {
    "rtx-key": {
        "flavor": "rtx", "version": "1.7.1", "gpu": None, "capabilities": ["8.9"], "batch": [1, 16, 64], "plans": {},
    }
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of exports, which leave the bundle without engines."""
    found = []

    def export(source: Path, folder: Path, images: Any, route: str, progress: Any, **options: Any) -> Manifest:
        found.append({"source": source, "folder": folder, "route": route} | options)
        return read_manifest(folder).model_copy(update={"engines": {}})

    monkeypatch.setattr(export_module, "export_bundle", export)
    return found


@pytest.fixture
def bundle(run: Path) -> Path:
    """Of the tiny run: at its own std, rounded, with the graph of the bound and engines."""
    folder = run / "bundle"
    described = json.loads((folder / "manifest.json").read_text())
    described["graphs"]["bound"] = described["graphs"]["inverse"]
    described["checkpoint"]["weights"] = "float16"
    described |= {"std": ["0.9", "z0=0.3"], "engines": ENGINES}
    (folder / "manifest.json").write_text(json.dumps(described))
    return folder


def last_line(result: Any) -> str:
    assert result.code == 1
    line: str = result.err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


KEPT = {
    "route": "both",
    "bound": True,
    "half": True,
    "std": ["0.9", "z0=0.3"],
    "precision": "fp32",
    "tuning": "any",
    "view": None,
    "calibration": None,
}


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ((), {}),
        (("--precision", "mixed"), {"precision": "mixed"}),
        (("--std", "0.5", "--no-bound", "--no-half"), {"std": ["0.5"], "bound": False, "half": False}),
        (("--route", "inverse"), {"route": "inverse"}),
    ],
)
def test_what_was_not_said_stays(
    hflow: Command, bundle: Path, calls: list[dict[str, Any]], words: tuple[str, ...], changed: dict[str, Any]
) -> None:
    for named, source in ((bundle, bundle), (bundle.parent, bundle.parent), (bundle / "model.safetensors", bundle)):
        result = ok(hflow("export", named, *words))
        wanted = {"source": source / "model.safetensors", "folder": bundle} | KEPT | changed
        assert calls.pop() == wanted
        assert result.err.count("gone with the graphs they were built from: TensorRT engines rtx-key") == 1
    if not words:
        kept = "is exported again as it was: --bound --std 0.9 --std z0=0.3 --half"
        assert f"{bundle} {kept}\n" in result.err


def test_a_bundle_of_one_route_keeps_it(hflow: Command, bundle: Path, calls: list[dict[str, Any]]) -> None:
    described = json.loads((bundle / "manifest.json").read_text())
    described["graphs"] = {"forward": described["graphs"]["forward"]}
    described["routes"] = {"forward": "forward"}
    (bundle / "manifest.json").write_text(json.dumps(described | {"precision": "mixed", "spaces": {}}))
    ok(hflow("export", bundle))
    assert (calls[0]["route"], calls[0]["precision"], calls[0]["bound"]) == ("forward", "mixed", False)


def test_another_model_takes_nothing(hflow: Command, bundle: Path, calls: list[dict[str, Any]]) -> None:
    """Options of a bundle whose settings differ, or that cannot be read, say nothing about this model."""
    described = json.loads((bundle / "manifest.json").read_text())
    described["config"]["style_channels"] = 99
    (bundle / "manifest.json").write_text(json.dumps(described))
    result = ok(hflow("export", bundle.parent))
    assert calls[0] | {"source": 0, "folder": 0} == {
        "source": 0, "folder": 0, "route": "both", "bound": False, "half": False, "std": ["0.7"],
        "precision": "fp32", "tuning": "any", "view": None, "calibration": None,
    }  # fmt: skip
    assert "as it was" not in result.err


def test_engines_are_built_on_graphs_as_they_were(
    hflow: Command, bundle: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'hflow-rt[rtx]'")
    from hflow_rt.errors import BundleError

    def stop(*arguments: Any) -> Any:
        raise BundleError("far enough")

    monkeypatch.setattr("hflow_rt.export.tensorrt_bundle.add_engines", stop)
    result = hflow("export", "--engine", "trt", "--precision", "mixed", "--compute-capability", "8.9")
    assert last_line(result) == "error: far enough"
    assert "lacks mixed arithmetic: exporting its graphs again" in result.err
    wanted = {"source": bundle.parent / "model.safetensors", "folder": bundle} | KEPT | {"precision": "mixed"}
    assert calls == [wanted]


def test_weights_are_not_unrounded(hflow: Command, bundle: Path, calls: list[dict[str, Any]]) -> None:
    from hflow_rt.models.checkpoint import load_model, save_model

    model = load_model(bundle / "model.safetensors")
    save_model(bundle / "model.safetensors", "hflow", model, model.state_dict(), {"weights": "float16"})
    assert "was rounded to half precision; with --no-half export the run" in last_line(
        hflow("export", bundle, "--no-half")
    )
    assert not calls


def test_what_was_installed_stays(
    hflow: Command, bundle: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hflow_rt.export.making.is_installed", lambda folder: folder.samefile(bundle))
    assert "was installed and must stay as it is; say where the engines go with --out" in last_line(
        hflow("export", bundle)
    )
    shutil.copytree(bundle, "mine")
    ok(hflow("export", bundle, "-o", "mine"))
    assert [call["folder"] for call in calls] == [Path("mine")]


def test_a_bundle_in_place_for_real(hflow: Command, run: Path) -> None:
    before = read_manifest(run / "bundle")
    result = ok(hflow("export", run / "bundle", "--route", "inverse", "--std", "0.5"))
    assert re.search(rf"^{run}/bundle/inverse.onnx: \d+ nodes", result.out, re.MULTILINE)
    after = read_manifest(run / "bundle")
    assert (list(after.graphs), after.std, after.verified) == (["inverse"], ("0.5",), True)
    assert after.checkpoint["sha256"] == before.checkpoint["sha256"]
    assert not (run / "bundle" / "bundle").exists()
