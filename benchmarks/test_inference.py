"""Latency of both directions: the plain model that recomputes everything, the folded one, ONNX Runtime."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.runtime import load

PRESETS = ("hflow-demo", "hflow-128", "hflow-256", "glow-64")
ROUNDS = {"hflow-demo": 30, "hflow-128": 12, "hflow-256": 7, "glow-64": 5}
FORWARD_ONLY = ("hflow-256", "glow-64")  # whose proof would take most of the time


def latents_of(session: Any) -> dict[str, Any]:
    return next(session.draw([0], 0.7, seed=0))


def parity_of(session: Any) -> dict[str, str]:
    """The bundle's own proof: image error against float64 and the round trip through both engines."""
    report = session.manifest.parity
    image = max(case["outputs"]["image"]["max"] for case in report["graphs"]["forward"])
    found = {"engine_error": f"{image:.1e}"}
    for trip in report.get("round_trip", [])[:1]:
        found |= {"round_trip": f"{trip['max']:.1e}", "uint8_differs": f"{trip['uint8_differs']:.2%}"}
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_forward(benchmark: Any, preset: str, exported: Any, take_turns: Any, record: Any) -> None:
    model, bundle = exported(preset, "forward" if preset in FORWARD_ONLY else "both")
    session = load(bundle, "onnx", "cpu")
    folded = model.folded()
    latents = latents_of(session)
    tensors = {name: torch.from_numpy(value) for name, value in latents.items()}
    variants: dict[str, Callable[[], Any]] = {
        "torch eager, unfolded": lambda: model.decode(tensors),
        "torch eager, folded": lambda: folded.decode(tensors),
        "ONNX Runtime": lambda: session.forward(latents),
    }
    with torch.inference_mode():
        images = [np.asarray(run()) for run in variants.values()]
        for image in images[1:]:
            assert np.abs(image - images[0]).max() < 1e-3
        record(f"{preset} forward, batch 1", take_turns(variants, ROUNDS[preset]), **parity_of(session))
    benchmark.pedantic(variants["ONNX Runtime"], rounds=5, iterations=1)


@pytest.mark.parametrize("preset", PRESETS[:2])
def test_inverse(benchmark: Any, preset: str, exported: Any, take_turns: Any, record: Any) -> None:
    model, bundle = exported(preset, "both")
    session = load(bundle, "onnx", "cpu")
    folded = model.folded()
    image = session.forward(latents_of(session))
    tensor = torch.from_numpy(image)
    variants: dict[str, Callable[[], Any]] = {
        "torch eager, unfolded": lambda: model.encode(tensor),
        "torch eager, folded": lambda: folded.encode(tensor),
        "ONNX Runtime": lambda: session.inverse(image),
    }
    with torch.inference_mode():
        found = [run().latents["z0"] for run in variants.values()]
        for latent in found[1:]:
            assert np.abs(np.asarray(latent) - np.asarray(found[0])).max() < 1e-2
        record(f"{preset} inverse, batch 1", take_turns(variants, ROUNDS[preset]))
    benchmark.pedantic(variants["ONNX Runtime"], rounds=5, iterations=1)


MEASURED = """
import json, runpy, sys
sys.argv = ["hflow-rt", "sample", *sys.argv[1:]]
try:
    runpy.run_module("hflow_rt.cli", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code
# not getrusage: its peak survives exec and would be that of the process that started us
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(json.dumps({"peak_mib": round(peak), "torch_imported": "torch" in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize("preset", ["hflow-demo", "hflow-256"])
def test_cold_start(benchmark: Any, preset: str, exported: Any, take_turns: Any, record: Any, tmp_path: Path) -> None:
    """`hflow-rt sample -n 1`, from process start to the file written."""
    _, bundle = exported(preset, "both" if preset != "hflow-256" else "forward")
    output = tmp_path / "sample.png"
    command = [sys.executable, "-c", MEASURED, str(bundle), "-n", "1", "--device", "cpu", "-o", str(output)]

    def run() -> dict[str, Any]:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        measured: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
        return measured

    measured = run()
    assert output.is_file()
    assert not measured["torch_imported"]
    record(f"{preset} sample -n 1, whole process", take_turns({"ONNX Runtime": run}, 5), **measured)
    benchmark.pedantic(run, rounds=2, iterations=1)
