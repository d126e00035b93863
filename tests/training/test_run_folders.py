"""A run's folder belongs to one training at a time."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hflow_rt.errors import CheckpointError, DataError
from hflow_rt.runs import new_run, taken


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda text: "20261129-120000")
    names = [new_run("hflow-demo", tmp_path / "runs").name for _ in range(3)]
    assert names == ["hflow-demo-20261129-120000", "hflow-demo-20261129-120000-2", "hflow-demo-20261129-120000-3"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make"):
        new_run("hflow-demo", tmp_path / "file")


def test_two_runs_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with taken(folder):
        (folder / "run.json").write_text("{}")
        with pytest.raises(CheckpointError, match="another training is using"), taken(folder):
            raise AssertionError("must not get here")
        assert (folder / "run.json").read_text() == "{}"
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    with taken(folder):
        pass


def test_a_folder_left_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), taken(tmp_path / "deep" / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "deep" / "run").exists()


HOLD = """
import sys, time
from pathlib import Path
from hflow_rt.runs import taken
with taken(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_holds_it_until_it_dies(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match="another training is using"), taken(tmp_path / "run"):
        raise AssertionError("must not get here")
    process.kill()
    process.wait()
    process.stdout.close()
    with taken(tmp_path / "run"):
        pass
