import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hflow_rt.cli.__main__ import app
from hflow_rt.errors import CheckpointError, ConfigError, DataError
from hflow_rt.runs import checkpoints

HERE = Path(__file__).parent

# what `hflow-rt` does, with the toy family known
COMMAND = (
    "import hflow_rt.models.registry as registry; registry.FAMILIES['toy'] = 'toy_family'; "
    "from hflow_rt.cli.__main__ import main; main()"
)


@pytest.fixture
def folder(tmp_path: Path, images: Any) -> Path:
    """The toy's images as files."""
    (tmp_path / "pictures").mkdir()
    for name, pixels in zip(images.names, images.array, strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def _train(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_train_then_resume(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = _train("--preset", "toy", "--data", folder, "--out", run, "--images", 80, "--device", "cpu")
    assert first.exit_code == 0, first.output
    lines = first.stdout.splitlines()
    assert lines[0].startswith(f"{run}: 80 images in 10 steps, ")
    assert lines[0].endswith(" images/s")
    assert lines[1] == "on 5 held-out images:"
    assert re.match(
        r"  at initialisation: bits/dim \d+\.\d{3} ± \d\.\d{3} strict bound, \d+\.\d{3} paper's bound$", lines[2]
    )
    assert "now: " in lines[3]
    assert lines[-1] == f"next: hflow-rt export {run}"
    # piped: a line at each evaluation
    assert first.stderr.startswith("40 images to train on, 5 held out, by a hash of the names\n")
    assert [line.split("  ")[0] for line in first.stderr.splitlines()[2:]] == ["0 images", "80 images"]
    with Image.open(run / "samples" / "000000080.png") as picture:
        assert picture.mode == "RGB"

    second = _train("--resume", run, "--images", 160, "--set", "training.log_every=1", "--json")
    assert second.exit_code == 0, second.output
    found = json.loads(second.stdout)
    assert (found["images"], found["step"], found["stopped_by"]) == (160, 20, "images")
    assert found["final"]["figures"]["strict"]["mean"] < found["initial"]["figures"]["strict"]["mean"]
    third = _train("--resume", "--out", run, "--images", 168, "--json")
    assert json.loads(third.stdout)["images"] == 168
    earlier = checkpoints(run)[0]
    fourth = _train("--resume", earlier, "--images", 168, "--json")
    assert json.loads(fourth.stdout)["images"] == 168


def test_split_folders_ignored(images: Any, tmp_path: Path) -> None:
    """What is trained on is said and recorded; a run that began with another split hears of it when it goes on."""
    for index, pixels in enumerate(images.array):
        path = tmp_path / "all" / "photos" / ("Train" if index % 3 else "Test") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    run, split = tmp_path / "run", "30 images to train on, 15 held out, by the folders photos/Train/ and photos/Test/"
    first = _train("--preset", "toy", "--data", tmp_path / "all", "--out", run, "--images", 8)
    assert first.stderr.splitlines()[0] == split
    about = json.loads((run / "run.json").read_text())
    assert about["run"]["data"]["split"] == split
    again = _train("--resume", run, "--images", 16)
    assert again.exit_code == 0, again.output
    assert "warning" not in again.stderr
    del about["run"]["data"]["split"]  # as older versions wrote it, which did not see these folders
    (run / "run.json").write_text(json.dumps(about))
    again = _train("--resume", run, "--images", 24)
    assert again.exit_code == 0, again.output
    assert again.stderr.splitlines()[1].startswith(
        "warning: the run began with images split by a hash of the names, so it has seen some that are now held out"
    )


def test_resume_without_a_name_takes_the_latest_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no trained run under runs/"):
        raise _train("--resume").exception
    assert _train("--preset", "toy", "--data", folder, "--images", 8).exit_code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("toy-")
    again = _train("--resume", "--images", 16, "--json")
    assert json.loads(again.stdout)["run"] == f"runs/{run.name}"


def test_a_config_file_is_enough(folder: Path, tmp_path: Path) -> None:
    _train("--preset", "toy", "--data", folder, "--out", tmp_path / "a", "--images", 8)
    again = _train("--config", tmp_path / "a" / "run.json", "--data", folder, "--out", tmp_path / "b", "--json")
    assert json.loads(again.stdout)["images"] == 8


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--preset", "hflow-dmo"], ConfigError, "unknown preset 'hflow-dmo'; did you mean hflow-demo"),
        (["--preset", "toy", "--set", "training.sed=1"], ConfigError, "did you mean training.seed"),
        (["--preset", "toy", "--minutes", "0"], ConfigError, "--minutes must be > 0 and finite; found 0"),
        (["--preset", "toy", "--minutes", "nan"], ConfigError, "--minutes must be > 0 and finite; found nan"),
        (["--preset", "toy", "--images", "-1"], ConfigError, "--images must be > 0 and finite; found -1"),
        (
            ["--preset", "toy", "--device", "tpu"],
            ConfigError,
            "device must be auto, cpu or cuda; found 'tpu'",
        ),
        (["runs/x"], ConfigError, "a run is named only with --resume; found 'runs/x'"),
        (["--resume", "--preset", "toy"], ConfigError, "--resume takes weights and settings from the run"),
        (["--resume", "none"], CheckpointError, "none is no run"),
        (["--preset", "toy", "--data", "none"], DataError, "none"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = _train(*arguments)
    assert isinstance(found.exception, kind)
    assert message in str(found.exception)
    assert "\n" not in str(found.exception)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["--preset", "toy", "--data", str(folder), "--out", str(run), "--images", "100000000"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "train", *settings],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    # the first checkpoint (1000 images) is there, so it trains
    while not checkpoints(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert f"interrupted and saved; go on with: hflow-rt train --resume {run}" in errors
    assert f"next: hflow-rt train --resume {run}" in output
    seen = int(checkpoints(run)[-1].name)
    assert seen % 8 == 0
    assert f"{run}: {seen:,} images" in output
    again = _train("--resume", run, "--images", seen + 8, "--json")
    assert json.loads(again.stdout)["images"] == seen + 8


def test_the_sample_grid_has_a_row_for_each_std(folder: Path, tmp_path: Path) -> None:
    _train("--preset", "toy", "--data", folder, "--out", tmp_path / "run", "--images", 8)
    with Image.open(tmp_path / "run" / "samples" / "000000008.png") as picture:
        shown = np.asarray(picture)
    assert shown.shape[0] >= 5 * 96  # small images are enlarged
    assert shown.shape[1] >= 8 * 96
    assert shown.std() > 1
