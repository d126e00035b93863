"""A machine with numpy, Pillow and ONNX Runtime runs a bundle: shown in a virtualenv that has no torch."""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import distribution, requires
from importlib.metadata import files as files_of
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CLEAN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
PROBE = """
import json, importlib.util, sys
from hflow_rt.runtime import load
image = load(sys.argv[1]).sample(1, std=0.7)
missing = [n for n in ("torch", "onnx", "onnxscript", "triton", "accelerate") if importlib.util.find_spec(n) is None]
print(json.dumps({"shape": list(image.shape), "missing": missing}))
"""


def needed(package: str, extra: str = "") -> set[str]:
    """Names of what pip would bring along with it, itself included."""
    names, asked = {package}, [(package, extra)]
    while asked:
        name, wanted = asked.pop()
        for line in requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                asked += [(requirement.name, also) for also in requirement.extras]
                if requirement.name not in names:
                    names.add(requirement.name)
                    asked.append((requirement.name, ""))
    return names


@pytest.fixture
def lean(wheel_file: Path, tmp_path: Path) -> Path:
    """Python of a virtualenv with the package, and of what is installed only what its extra `cpu` brings along."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for name in needed("hflow-rt", "cpu") - {"hflow-rt"}:
        files = files_of(name) or ()
        for top in {path.parts[0] for path in files if ".." not in path.parts}:
            if not (site / top).exists() and top != "__pycache__":
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", "--no-deps"]
    subprocess.run([*pip, wheel_file], check=True, cwd=tmp_path, env=CLEAN)
    return python


@pytest.mark.slow
def test_a_virtualenv_without_torch_runs_a_bundle(tiny_run: Path, tmp_path: Path, lean: Path) -> None:
    bundle = tiny_run / "bundle"
    done = subprocess.run(
        [lean, "-c", PROBE, bundle], capture_output=True, text=True, env=CLEAN, check=True, cwd=tmp_path
    )
    found = json.loads(done.stdout)
    assert found["shape"] == [1, 3, 16, 16]
    assert found["missing"] == ["torch", "onnx", "onnxscript", "triton", "accelerate"]

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [lean.with_name("hflow-rt"), *words],
            capture_output=True,
            text=True,
            env=CLEAN,
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
