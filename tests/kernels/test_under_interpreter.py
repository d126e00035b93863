"""Runs the tests of `interpreted/` by Triton's interpreter, which has to be chosen before triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install 'hflow-rt[kernels]' on Linux")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    counts = re.search(r"(\d+) passed", run.stdout)
    assert counts is not None, run.stdout
    assert int(counts[1]) > 240
    assert not re.search(r"\d+ (skipped|deselected)", run.stdout)
