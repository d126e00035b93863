"""Ctrl-C, a killed process, and a bug of ours: nothing half-written, and no traceback but of the bug."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import INTERRUPTIBLE, refused, tree

from hflow_rt.manifest import read_manifest
from hflow_rt.models.checkpoint import load_model

Command = Callable[..., Any]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def interrupted(*arguments: object, after: str) -> Any:
    """Start a command in a process of its own, send SIGINT once stderr shows `after`; exit code, stdout, stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    seen = ""
    for line in process.stderr:
        seen += line
        if after in line:
            process.send_signal(signal.SIGINT)
            break
    seen += process.stderr.read()
    out = process.stdout.read()
    code = process.wait()
    watchdog.cancel()
    process.stdout.close()
    process.stderr.close()
    assert after in seen, seen
    return code, out, seen


def test_ctrl_c_during_export(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file()}
    code, out, err = interrupted("export", after="writing forward.onnx")
    assert code == 130
    assert out == ""
    assert err == "writing forward.onnx\ninterrupted; nothing half-written was kept\n"
    assert {name: (run / name).read_bytes() for name in tree(run) if (run / name).is_file()} == before
    assert read_manifest(run / "bundle").verified


def test_ctrl_c_during_the_first_export(run: Path) -> None:
    shutil.rmtree(run / "bundle")
    code, _, err = interrupted("export", after="writing forward.onnx")
    assert code == 130
    assert err.endswith("\ninterrupted; nothing half-written was kept\n")
    assert tree(run) == {"model.safetensors"}


def test_ctrl_c_during_train(hflow: Command, run: Path, photo: Command, tiny_settings: dict[str, Any]) -> None:
    for index in range(20):
        photo(f"photos/{index}.png")
    training = {
        "batch_size": 2,
        "accumulate": 1,
        "images": 1_000_000,
        "init_images": 8,
        "learning_rates": dict.fromkeys(("encoders", "decoders", "flows"), 1e-4),
        "evaluate_images": 2,
        "evaluate_every_images": 20,
        "sample_every_images": 1_000_000,
    }
    Path("tiny.json").write_text(json.dumps({"family": "hflow", "model": tiny_settings, "training": training}))
    arguments = ("train", "--config", "tiny.json", "--data", "photos", "--out", "runs/mine")
    code, out, err = interrupted(*arguments, after="20 images")
    assert code == 130, err
    assert err.endswith("\ninterrupted and saved; go on with: hflow-rt train --resume runs/mine\n")
    assert "Traceback" not in err
    assert "next: hflow-rt train --resume runs/mine" in out
    assert not [name for name in tree("runs/mine") if Path(name).name.startswith(".")]
    seen = int(sorted(Path("runs/mine/checkpoints").iterdir())[-1].name)
    assert load_model("runs/mine/model.safetensors").resolution == 16
    more = hflow("train", "--resume", "runs/mine", "--images", seen + 4, "--json")
    assert more.code == 0, more.err
    assert json.loads(more.out)["images"] == seen + 4


def test_what_a_killed_process_leaves_is_never_picked_up(hflow: Command, run: Path) -> None:
    """Temporary names begin with a dot: neither the newest run nor its bundle is ever one of them."""
    shutil.copytree(run, "runs/.tiny.k3j2h1")
    os.utime("runs/.tiny.k3j2h1/model.safetensors", (2**31, 2**31))
    shutil.copytree(run / "bundle", run / ".bundle.x1y2z3")
    shutil.rmtree(run / "bundle")
    refused(hflow("sample"), f"{run} has no exported bundle; run 'hflow-rt export {run}' first")
    assert hflow("info").out.startswith(f"{run}: hflow")


@pytest.mark.parametrize("when", ["before", "while"])
def test_ctrl_c_anywhere_is_one_line(hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def interrupt(*arguments: object, **options: object) -> object:
        raise KeyboardInterrupt

    if when == "before":
        monkeypatch.setattr("hflow_rt.cli.latents.open_session", interrupt)
    else:
        monkeypatch.setattr("hflow_rt.runtime.images.pictures.write_pictures", interrupt)
    result = hflow("sample")
    assert result.code == 130
    assert result.out == ""
    assert result.err.splitlines()[-1] == "interrupted; nothing half-written was kept"
    assert not Path("samples.png").exists()


def test_a_bug_shows_its_traceback(hflow: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*arguments: object, **options: object) -> object:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("hflow_rt.cli.latents.open_session", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        hflow("sample")


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_ctrl_c_while_starting(run: Path, share: float) -> None:
    """At any moment: exit code 130 or death by the signal, one line at most, and never that a package is missing."""
    code = INTERRUPTIBLE.replace("main()\n", 'print("starting", flush=True)\nmain()\n')
    command = [sys.executable, "-c", code, "sample", "-n", "300", "-o", "x.png"]
    started = time.monotonic()
    assert subprocess.run(command, capture_output=True, env=ENVIRONMENT, check=False).returncode == 0
    whole = time.monotonic() - started
    Path("x.png").unlink()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(share * whole / 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:  # it was faster this time
        return
    assert process.returncode in (130, -signal.SIGINT), err
    lines = [line for line in err.splitlines() if not line.startswith("hflow 16x16 from")]
    assert lines in ([], ["interrupted; nothing half-written was kept"])
    assert not Path("x.png").exists()
