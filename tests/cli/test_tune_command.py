"""`hflow-rt tune`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hflow_rt.errors import HFlowError


def test_measures_keeps_and_forgets(run: Path, hflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    plain = hflow("sample", run, "-n", "3", "-o", tmp_path / "plain.png")
    done = hflow("tune", run, "--batch", "2", "--rounds", "1")
    assert done.code == 0, done.err
    kept = [line for line in done.out.splitlines() if line.endswith("<- kept")]
    assert [line.split("  ")[0].strip() for line in kept] == [
        f"{graph}, {images}" for graph in ("forward", "inverse") for images in ("1 image", "2 images")
    ]
    assert "forward opens in" in done.out
    assert len(list((tmp_path / "hflow-rt" / "tuned").iterdir())) == 2
    assert hflow("sample", run, "-n", "3", "-o", tmp_path / "tuned.png").code == plain.code == 0
    assert (tmp_path / "tuned.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert hflow("tune", run, "--forget").out == "forgotten: forward, inverse\n"
    assert "nothing was kept of" in hflow("tune", run, "--forget").out


def test_json_goes_to_stdout_alone(run: Path, hflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = json.loads(hflow("tune", run, "--batch", "1", "--rounds", "1", "--json").out)
    assert found.keys() == {"forward", "inverse"}
    assert found["forward"]["settings"]["threads"] == 1
    assert json.loads(hflow("tune", run, "--forget", "--json").out) == {"forgotten": ["forward", "inverse"]}


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (1.5, True)])
def test_a_busy_machine_is_pointed_out(
    run: Path, hflow: Any, monkeypatch: pytest.MonkeyPatch, load: float, warned: bool
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise HFlowError("about to measure")

    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("hflow_rt.runtime.engines.tune.tune_runtime", stop)
    monkeypatch.setattr("hflow_rt.export.bundle.export_bundle", stop)
    for command in (("tune",), ("export", "--tune", "cpu"), ("export", "--tune", "any")):
        done = hflow(command[0], run, *command[1:])
        assert done.err.splitlines()[-1] == "error: about to measure"
        said = "warning: other work used 1.5 cores in the minute before; what is chosen" in done.err
        assert said == (warned and command[-1] != "any"), command


def test_mistakes_are_one_line(run: Path, hflow: Any) -> None:
    done = hflow("tune", run, "--batch", "0")
    assert (done.code, done.out) == (1, "")
    assert "must be at least 1" in done.err.splitlines()[-1]


def test_a_cache_that_cannot_be_written_is_one_line(
    run: Path, hflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = hflow("tune", run, "--batch", "1", "--rounds", "1")
    assert done.code == 1
    assert "cannot write" in done.err.splitlines()[-1]
