"""A machine with numpy, Pillow and ONNX Runtime runs a bundle: shown in a virtualenv that has no torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROBE = """
import json, importlib.util, sys
from hflow_rt.runtime import load
image = load(sys.argv[1]).sample(1, std=0.7)
missing = [n for n in ("torch", "onnx", "onnxscript", "triton", "accelerate") if importlib.util.find_spec(n) is None]
print(json.dumps({"shape": list(image.shape), "missing": missing}))
"""


@pytest.mark.slow
def test_a_virtualenv_without_torch_runs_a_bundle(tiny_run: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    source = tmp_path / "source"  # pip builds in the tree it installs from
    hidden = shutil.ignore_patterns(".*", "runs", "build", "__pycache__")
    shutil.copytree(REPOSITORY, source, ignore=hidden)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", f"{source}[cpu]"],
        capture_output=True, text=True, env=clean, check=False, cwd=tmp_path,
    )  # fmt: skip
    if installed.returncode and "No matching distribution" in installed.stderr + installed.stdout:
        pytest.skip("needs a package index to install numpy, Pillow and onnxruntime from")
    assert installed.returncode == 0, installed.stderr
    bundle = tiny_run / "bundle"
    done = subprocess.run(
        [python, "-c", PROBE, bundle], capture_output=True, text=True, env=clean, check=True, cwd=tmp_path
    )
    found = json.loads(done.stdout)
    assert found["shape"] == [1, 3, 16, 16]
    assert found["missing"] == ["torch", "onnx", "onnxscript", "triton", "accelerate"]

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [environment / "bin" / "hflow-rt", *words],
            capture_output=True,
            text=True,
            env=clean,
            check=False,
            cwd=tmp_path,
        )

    sampled = command("sample", str(bundle), "-n", "2")
    assert sampled.returncode == 0, sampled.stderr
    assert (tmp_path / "samples.png").is_file()
    for words, message in (
        (("train",), "hflow-rt[train]"),
        (("check", str(bundle)), "hflow-rt[train]"),
        (("sample", str(bundle), "--backend", "torch"), "hflow-rt[train]"),
    ):
        refused = command(*words)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
