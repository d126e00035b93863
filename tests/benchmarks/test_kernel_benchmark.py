"""The GPU benchmark runs from end to end where there is no GPU, at tiny sizes, and says so where it cannot."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hflow_rt.kernels.dispatch import OPERATORS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")


def run(*arguments: str, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    switches = {"TRITON_INTERPRET": "1" if interpreted else "0", "HFLOW_RT_KERNELS": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | switches, capture_output=True, text=True, timeout=600, check=False)


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Cells of every row: what, variant, median, ratio, CoV, more."""
    assert done.returncode == 0, done.stderr
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]


@NO_GPU
def test_without_a_gpu_one_line_says_what_is_needed() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs a CUDA device" in done.stderr


@pytest.fixture(scope="module")
def dry() -> list[list[str]]:
    """Of every part."""
    parts = ("kernels", "decode", "training", "proof", "dispatch")
    named = [word for part in parts for word in ("--part", part)]
    return rows(run("--dry-run", "--preset", "glow-demo", "--ops", "^mixing forward", *named))


@NO_GPU
def test_a_dry_run_goes_through_every_part(dry: list[list[str]]) -> None:
    timed = {(what, variant) for what, variant, median, *_ in dry if median}
    for target in ("result", "gradient"):
        ops = {variant for what, variant in timed if what.startswith(f"mixing forward, C = 4, {target}, float32, ")}
        assert ops == {"eager", "torch.compile", "copy"}
    decodes = {variant for what, variant in timed if what == "glow-demo decode, batch 1"}
    switch = {"the switch alone", "plain torch"}  # of the part dispatch
    assert decodes - switch == {"eager", "folded", "folded, CUDA graph", "torch.compile"}
    assert ("glow-demo training step, batch 2", "eager") in timed
    failed = [row for row in dry if "failed" in row[-1]]
    assert {row[1] for row in failed} == {"kernels", "kernels, CUDA graph"}
    assert all("BackendUnavailable" in row[-1] for row in failed)


def test_a_dry_run_under_the_interpreter_has_kernels_that_agree() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install 'hflow-rt[kernels]' on Linux")
    done = run("--dry-run", "--part", "kernels", "--ops", "^blur_down$", interpreted=True)
    found = rows(done)
    assert [row for row in found if "failed" in row[-1]] == []
    kernels = [row for row in found if row[1] == "kernels"]
    assert len(kernels) == 4  # two targets, two types
    assert all(re.search(r"GB/s \d+, share \d+%, target 8[05]%", row[-1]) for row in kernels)


def test_proofs_are_timed(dry: list[list[str]]) -> None:
    found = [row for row in dry if row[0].startswith("proof of ")]
    assert [row[0] for row in found] == [f"proof of {operator}" for operator in OPERATORS]
    assert all(re.fullmatch(r"first s [\d.]+, again s [\d.]+, of tolerance \d+%", row[-1]) for row in found)


def test_what_has_no_time_left_is_a_row() -> None:
    found = rows(run("--dry-run", "--budget", "0", "--part", "decode"))
    assert [row[-1] for row in found] == ["left out: no time left"] * 2


def test_the_switch_is_priced(dry: list[list[str]]) -> None:
    found = [row[-1] for row in dry if row[1] == "the switch alone"]
    shares = [float(match[1]) for more in found if (match := re.search(r"share ([\d.]+)%", more))]
    assert len(shares) == 3
    assert all(0 < share < 2 for share in shares)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    import measuring

    return measuring


def test_a_report_keeps_other_parts_and_is_there_after_every_row(measuring: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels-any"
    report = measuring.Report(path)
    report.start("decode")
    report.compare("a decode", {"eager": [2.0, 2.0], "kernels": [1.0, 1.0]}, {"kernels": {"images/s": 1}})
    report.start("training")
    report.add("a step", "kernels", note="failed: for a reason")
    again = measuring.Report(path)
    again.start("decode")
    again.add("a decode", "eager", ms=1.0, min_ms=1.0, ratio=1.0, cov=0.5, rounds=2)
    found = json.loads(path.with_suffix(".json").read_text())["parts"]
    assert [row["variant"] for row in found["decode"]["rows"]] == ["eager"]
    assert found["training"]["rows"] == [{"what": "a step", "variant": "kernels", "note": "failed: for a reason"}]
    assert {"commit", "driver", "gpu", "torch", "triton"} <= set(found["decode"]["machine"])
    table = path.with_suffix(".md").read_text()
    assert "| a decode | eager | 1.00 ms | 1.00x | 50.0% (unstable) |" in table
    assert "| a step | kernels | | | | failed: for a reason |" in table


def test_a_time_limit_ends_what_runs_too_long(measuring: Any) -> None:
    with pytest.raises(TimeoutError, match="gave up"), measuring.time_limit(0.05):
        time.sleep(10)
    with pytest.raises(TimeoutError, match="no time left"), measuring.time_limit(0):
        pass
    with measuring.time_limit(5):
        pass
