"""What docs/examples shows runs."""

import inspect
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hflow_rt

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def photograph(seed: int) -> Image.Image:
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return Image.fromarray(corners).resize((80, 80), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs and something that is none."""
    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(("a.png", "b.png")):
        photograph(seed).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "c.txt").write_text("no picture")
    return tmp_path


def run(folder: Path, script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sample(folder: Path) -> None:
    run(folder, "sample.py", "samples.png")
    with Image.open(folder / "samples.png") as sheet:
        assert min(sheet.size) > 4 * 64


def test_encode(folder: Path) -> None:
    assert "every 8-bit value comes back: True" in run(folder, "encode.py", "photos/a.png", "b.png")
    with Image.open(folder / "b.png") as found:
        assert found.size == (64, 64)


def test_interpolate(folder: Path) -> None:
    run(folder, "interpolate.py", "photos/a.png", "photos/b.png", "walk.gif")
    with Image.open(folder / "walk.gif") as walk:
        assert walk.n_frames == 46  # type: ignore[attr-defined]


def test_outliers(folder: Path) -> None:
    lines = run(folder, "outliers.py", "photos").splitlines()
    bits = [float(line.split()[0]) for line in lines]
    assert len(lines) == 2
    assert bits == sorted(bits, reverse=True)


@pytest.mark.slow
def test_train_and_export(folder: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for training and export, which others test: their place is taken by a run that is there."""

    def train(preset: str, data: str, out: str, minutes: float) -> None:
        inspect.signature(trains).bind(preset, data=data, out=out, minutes=minutes)
        assert (preset, data, minutes) == ("hflow-demo", "photos", 0.5)
        shutil.copytree(tiny_run, folder / out)

    def export(run: str) -> None:
        inspect.signature(exports).bind(run)
        assert run == "runs/mine"

    trains, exports = hflow_rt.train, hflow_rt.export
    monkeypatch.chdir(folder)
    monkeypatch.setattr(hflow_rt, "train", train)
    monkeypatch.setattr(hflow_rt, "export", export)
    monkeypatch.setattr(sys, "argv", ["train_and_export.py", "photos", "runs/mine", "0.5"])
    runpy.run_path(str(EXAMPLES / "train_and_export.py"))
    assert Path("runs/mine/samples.png").exists()


def test_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    monkeypatch.chdir(folder)
    known: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), known)
    np.testing.assert_array_equal(known["again"], known["levels"])


def test_gradio_app(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    monkeypatch.syspath_prepend(EXAMPLES)
    import gradio_app  # type: ignore[import-not-found]

    found, said = gradio_app.through(photograph(3), 1.0)
    assert found.size == (64, 64)
    assert "bits/dim" in said
    assert gradio_app.samples(1, 0.7).width > 4 * 64
    assert len(gradio_app.demo.fns) >= 2
