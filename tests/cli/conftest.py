"""Commands run in this process, and a run of one's own to run them on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_rt.cli.__main__ import main

sys.path.insert(0, str(Path(__file__).parent))  # what tests share is found by name


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def hflow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `hflow-rt ARGUMENTS` as the entry point does; whatever is no user's mistake comes out as an exception."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hflow-rt", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code or 0
        assert isinstance(code, int)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def python() -> Callable[[str], Result]:
    """Run Python code in a process of its own, one thread, warnings on."""

    def call(code: str, *arguments: object) -> Result:
        process = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
            timeout=120,
        )
        return Result(process.returncode, process.stdout, process.stderr)

    return call


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny run as `runs/tiny`, in a working folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    return Path("runs/tiny")


@pytest.fixture
def photo(run: Path) -> Callable[..., Path]:
    """Write a smooth picture: `photo(name, width, height)`."""

    def save(name: str, width: int = 16, height: int = 16) -> Path:
        rng = np.random.default_rng(list(name.encode()))
        corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).save(path)
        return path

    return save


@pytest.fixture
def sets(photo: Callable[..., Path]) -> None:
    """Two folders, `bright` and `dark`."""
    for index in range(4):
        for name, least in (("bright", 128), ("dark", 0)):
            path = photo(f"{name}/{index}.png")
            with Image.open(path) as image:
                pixels = np.asarray(image) // 2 + least
            Image.fromarray(pixels.astype(np.uint8)).save(path)
