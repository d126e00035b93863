"""Latency of both routes on every backend, and of the command from start to file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hflow_rt.bench.measure import measure_latency
from hflow_rt.bench.variants import VARIANTS, cases_of
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle

# preset -> batch sizes and rounds; hflow-256 in full takes an hour of proofs, so it has its forward engine alone
CASES: dict[str, tuple[tuple[int, ...], int]] = {
    "hflow-demo": ((1, 16), 20),
    "hflow-128": ((1, 16), 7),
    "hflow-256": ((1, 16), 5),
    "glow-64": ((1, 16), 5),
}
FORWARD_ONLY = ("hflow-256", "glow-64")
ON_CPU = [name for name, variant in VARIANTS.items() if variant.device == "cpu"]


@pytest.mark.parametrize("preset", CASES)
def test_latency(benchmark: Any, preset: str, exported: Any, publish: Any) -> None:
    """Every variant of `hflow-rt bench` on a CPU, in rounds that take turns."""
    _, folder = exported(preset, "forward" if preset in FORWARD_ONLY else "both")
    bundle = find_bundle(folder)
    batches, rounds = CASES[preset]
    report = measure_latency(bundle, ON_CPU, cases_of(bundle.manifest, "both"), batches, rounds)
    for row in report["rows"]:
        assert row.get("error", 0.0) < 1e-2, row  # the same model, or the figures compare nothing
    publish(preset, report)
    session = load(folder, "onnx", "cpu")
    latents = next(session.draw([0], session.std, seed=0))
    benchmark.pedantic(lambda: session.forward(latents), rounds=5, iterations=1)


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


def test_many_samples(benchmark: Any, exported: Any, take_turns: Any, record: Any, tmp_path: Path) -> None:
    """`hflow-rt sample -n 1000`, from process start to 1000 files, against the engine alone, latents ready."""
    _, bundle = exported("hflow-demo", "both")
    session = load(bundle, "onnx", "cpu")
    parts = list(session.draw(range(1000), session.std, seed=0))

    def alone() -> None:
        for part in parts:
            session.forward(part)

    def sample() -> None:
        command = [sys.executable, "-m", "hflow_rt.cli", "sample", str(bundle), "-n", "1000", "-o", str(tmp_path / "s")]
        subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)

    seconds = take_turns({"engine alone": alone, "hflow-rt sample": sample}, 5)
    assert len(list((tmp_path / "s").iterdir())) == 1000
    record("hflow-demo, 1000 images in batches of 16", seconds)
    benchmark.pedantic(alone, rounds=1, iterations=1)
