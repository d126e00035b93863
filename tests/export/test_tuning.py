"""Graphs for a CPU: proved like all others, and kept away from GPUs."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from hflow_rt.errors import BundleError, ConfigError
from hflow_rt.export import onnx as exporter
from hflow_rt.export.bundle import export_bundle
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle


@pytest.fixture
def tuned(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle of the tiny run with its convolutions of 6 and 8 channels taken for wide ones."""
    monkeypatch.setattr(exporter, "_NARROWEST", 6)
    monkeypatch.setattr(exporter, "_SMALLEST", 16)
    ramp = np.rint(np.linspace(0, 255, 16)).astype(np.float32) / np.float32(255)
    images = np.stack([np.broadcast_to(ramp, (3, 16, 16)), np.broadcast_to(ramp[:, None], (3, 16, 16))])
    manifest = export_bundle(tiny_run / "model.safetensors", tmp_path / "tuned", images, tuning="cpu")
    assert manifest.verified, manifest.parity
    return tmp_path / "tuned"


def test_tuned_graphs_are_the_model(tiny_run: Path, tuned: Path) -> None:
    bundle = find_bundle(tuned)
    assert bundle.manifest.tuning == "cpu"
    for name in ("forward", "inverse"):
        nodes = onnx.load(str(bundle.graph(name))).graph.node
        assert any(node.op_type == "DepthToSpace" for node in nodes)
        plain = onnx.load(str(find_bundle(tiny_run).graph(name))).graph.node
        wide = sum(node.op_type == "MatMul" for node in nodes) - sum(node.op_type == "MatMul" for node in plain)
        assert wide >= 4  # two a convolution
    with load(tuned) as session, load(tiny_run) as other:
        found, expected = session.sample(3, 0.7, seed=5), other.sample(3, 0.7, seed=5)
    assert 0 < np.abs(found - expected).max() < 1e-4


def test_no_tensorrt_from_them(tuned: Path) -> None:
    from hflow_rt.export.tensorrt import add_engines

    with pytest.raises(BundleError, match="written for a CPU; export them for GPUs with --tune any"):
        add_engines(find_bundle(tuned))


def test_not_with_mixed_precision(tiny_run: Path, tmp_path: Path) -> None:
    images = np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(ConfigError, match="choose one of them"):
        export_bundle(tiny_run / "model.safetensors", tmp_path / "b", images, precision="mixed", tuning="cpu")
    assert not (tmp_path / "b").exists()
