"""Exporting over a bundle and checking one: what others added, and what still holds, stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hflow_rt.export.bundle as export_module
from hflow_rt.errors import BundleError, ConfigError
from hflow_rt.export.bundle import check_bundle, export_bundle
from hflow_rt.files import sha256
from hflow_rt.manifest import graph_sha256, read_manifest
from hflow_rt.models.hflow.network import HFlow
from hflow_rt.runtime.bundle import find_bundle

IMAGES = np.random.default_rng(0).uniform(0, 1, (2, 3, 16, 16)).astype(np.float32)


def add_engines(bundle: Path, graph: str, key: str = "rtx-key") -> None:
    """A plan of `graph` that holds nothing, as if built for it."""
    place = bundle / "trt" / key
    place.mkdir(parents=True)
    (place / f"{graph}.plan").write_bytes(b"plan")
    (place / f"{graph}.layers.jsonl").write_text("")
    described = json.loads((bundle / "manifest.json").read_text())
    names = [f"trt/{key}/{graph}.plan", f"trt/{key}/{graph}.layers.jsonl"]
    for name in names:
        described["files"][name] = {"sha256": sha256(bundle / name), "bytes": (bundle / name).stat().st_size}
    digest = graph_sha256(read_manifest(bundle), graph)
    plan = {"file": names[0], "layers": names[1], "onnx": digest, "types": {"float": 1}, "seconds": 1.0}
    described["engines"][key] = {
        "flavor": "rtx", "version": "1.7.1", "gpu": None, "capabilities": ["8.9"], "batch": [1, 16, 64],
        "plans": {graph: plan},
    }  # fmt: skip
    (bundle / "manifest.json").write_text(json.dumps(described))


@pytest.fixture
def bundle(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run / "bundle", tmp_path / "bundle"))


def test_engines_stay_where_their_graphs_come_out_the_same(bundle: Path) -> None:
    add_engines(bundle, "forward")
    add_engines(bundle, "inverse", "rtx-old")
    described = json.loads((bundle / "manifest.json").read_text())
    described["engines"]["rtx-old"]["plans"]["inverse"]["onnx"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(described))
    (bundle / "latency.md").write_text("# Latency of hflow 16x16")
    manifest = export_bundle(bundle / "model.safetensors", bundle, IMAGES, std=["0.5"])
    assert manifest.std == ("0.5",)
    assert read_manifest(bundle) == manifest
    assert list(manifest.engines) == ["rtx-key"]
    assert (bundle / "latency.md").read_text() == "# Latency of hflow 16x16"
    assert find_bundle(bundle).file("trt/rtx-key/forward.plan").read_bytes() == b"plan"
    assert [path.name for path in (bundle / "trt").iterdir()] == ["rtx-key"]
    assert not [name for name in manifest.files if "rtx-old" in name]


def test_a_check_keeps_what_was_added_meanwhile(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any, **options: Any) -> dict[str, Any]:
        add_engines(bundle, "inverse")
        return {"backend": "onnx", "passed": False, "failures": ["wrong"]}

    monkeypatch.setattr(export_module, "run_parity", slow)
    check_bundle(find_bundle(bundle), IMAGES, "onnx", "cpu")
    manifest = read_manifest(bundle)
    assert list(manifest.engines) == ["rtx-key"]
    assert not manifest.verified


def test_a_check_says_nothing_of_graphs_that_came_meanwhile(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any, **options: Any) -> dict[str, Any]:
        described = json.loads((bundle / "manifest.json").read_text())
        described["files"]["forward.onnx"]["sha256"] = "1" * 64
        (bundle / "manifest.json").write_text(json.dumps(described))
        return {"backend": "onnx", "passed": True, "failures": []}

    found = find_bundle(bundle)
    monkeypatch.setattr(export_module, "run_parity", slow)
    with pytest.raises(BundleError, match="was exported again while it was checked; check it again"):
        check_bundle(found, IMAGES, "onnx", "cpu")


def test_rounded_weights_are_rounded_once(tiny_run: Path, tmp_path: Path) -> None:
    """Exported from its own file again, a rounded bundle is the same to the byte, and knows its origin."""
    first = export_bundle(tiny_run / "model.safetensors", tmp_path / "b", IMAGES, "forward", half=True)
    again = export_bundle(tmp_path / "b" / "model.safetensors", tmp_path / "b", IMAGES, "forward", half=True)
    assert again.checkpoint == first.checkpoint
    assert again.files == first.files


def test_a_family_without_nets_is_refused_before_anything_is_written(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    def never(*arguments: Any) -> Any:
        raise AssertionError("a graph was written")

    graphs = HFlow.graphs
    monkeypatch.setattr(export_module, "export_graph", never)
    monkeypatch.setattr(HFlow, "graphs", lambda m: {n: replace(spec, nets=()) for n, spec in graphs(m).items()})
    with pytest.raises(ConfigError, match="the hflow family has no nets for mixed precision; use --precision fp32"):
        export_bundle(tiny_run / "model.safetensors", tmp_path / "b", IMAGES, precision="mixed")
    assert list(tmp_path.iterdir()) == []
