"""`hflow-rt export --tune`."""

from pathlib import Path
from typing import Any

import pytest

from hflow_rt.export import tuning
from hflow_rt.runtime.bundle import find_bundle


def test_the_command_keeps_it_and_says_so(run: Path, hflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_ROUNDS", 1)  # what is faster does not matter here
    monkeypatch.setattr(tuning, "_FILL", 0.0)
    assert hflow("export", run, "--tune", "cpu", "--route", "forward").code == 0
    assert ", for a CPU, opset" in hflow("info", run).out
    again = hflow("export", run, "--std", "0.5")
    assert "exported again as it was:" in again.err
    assert "--tune cpu" in again.err
    assert find_bundle(run).manifest.tuning == "cpu"
    assert hflow("export", run, "--tune", "any").code == 0
    assert "for a CPU" not in hflow("info", run).out
