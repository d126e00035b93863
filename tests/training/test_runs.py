import os
import subprocess
import sys
from pathlib import Path

import pytest

from hflow_rt.errors import CheckpointError
from hflow_rt.runs import checkpoints, latest_run, new_run, read_run, resolve_run


def _run(path: Path, when: int) -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    os.utime(path / "model.safetensors", (when, when))
    return path


def test_the_latest_run_is_the_one_trained_last(tmp_path: Path) -> None:
    _run(tmp_path / "b", 100)
    expected = _run(tmp_path / "a", 200)
    _run(tmp_path / ".c", 300)  # the temporary folder of something killed
    (tmp_path / "d").mkdir()  # no checkpoint yet
    assert latest_run(tmp_path) == expected
    os.utime(tmp_path / "b" / "model.safetensors", (200, 200))
    assert latest_run(tmp_path).name == "b"  # a tie goes to the last name


def test_no_run_is_one_line_that_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for path, message in (
        (None, "no trained run under runs/"),
        (Path("none"), "no run at none"),
        (Path("empty"), "empty holds no model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            resolve_run(path)
        assert "hflow-rt train" in str(error.value)
        assert "hflow-rt demo" in str(error.value)
        assert "\n" not in str(error.value)
    expected = _run(tmp_path / "runs" / "x", 1)
    assert resolve_run(None).resolve() == expected
    assert resolve_run(expected) == expected


def test_checkpoints_are_in_order_and_nothing_else_counts(tmp_path: Path) -> None:
    for name in ("000000900", "1000000000", "000000100", "aside-000000950", ".000000990.x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["000000100", "000000900", "1000000000"]


def test_settings_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no run: it has no run\.json"):
        read_run(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run.json"):
            read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"family": "toy"}')
    assert read_run(tmp_path) == {"family": "toy"}
    assert new_run("toy", tmp_path).parent == tmp_path


def test_needs_no_torch() -> None:
    code = "import sys, hflow_rt.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
