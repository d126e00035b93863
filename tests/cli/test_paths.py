"""Paths that cannot be asked, and names that a terminal cannot show or a shell cannot read."""

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import ok, refused, tree

Command = Callable[..., Any]

LONG = "a" * 300


def readers(path: str) -> dict[str, tuple[object, ...]]:
    """Every way to name something that is read."""
    return {
        "encode": ("encode", f"{path}.png"),
        "encode model": ("encode", "a.png", "--model", path),
        "sample": ("sample", path),
        "decode": ("decode", f"{path}.safetensors"),
        "info": ("info", path),
        "export": ("export", path),
        "export images": ("export", "--images", path),
        "check": ("check", path),
        "check images": ("check", "--images", path),
        "bench": ("bench", path),
        "bench compare": ("bench", "--compare", path, path),
        "tune": ("tune", path),
        "curves": ("curves", path),
        "eval": ("eval", "bpd", path),
        "eval data": ("eval", "bpd", "--data", path),
        "eval features": ("eval", "distance", "--features", f"{path}.onnx"),
        "dataset": ("dataset", path, "-o", "x.npy", "--resolution", 16),
        "interpolate": ("interpolate", f"{path}.png", f"{path}.png"),
        "walk": ("walk", "--model", path),
        "zeroing": ("zeroing", path),
        "mix": ("mix", "--row-images", path),
        "neighbours": ("neighbours", "--data", path),
        "attribute make": ("attribute", "make", path, path),
        "attribute apply": ("attribute", "apply", path),
        "import": ("import", f"{path}.pt", "--family", "glow", "-o", "r"),
        "train data": ("train", "--data", path),
        "train from": ("train", "--from", path),
        "train resume": ("train", "--resume", path),
        "train config": ("train", "--config", path),
    }


KINDS = sorted(readers(""))


@pytest.mark.parametrize("kind", KINDS)
def test_path_that_cannot_be_asked_for_its_length(hflow: Command, run: Path, photo: Command, kind: str) -> None:
    photo("a.png")
    before = tree()
    refused(hflow(*readers(LONG)[kind]), LONG, "File name too long")
    assert tree() == before


@pytest.mark.parametrize("kind", KINDS)
def test_path_that_cannot_be_asked_for_want_of_permission(
    hflow: Command, run: Path, photo: Command, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What an ordinary user meets in a folder of mode 000; root may ask everything, so it is played."""
    photo("a.png")
    Path("d").mkdir()
    before = tree()

    def denying(function: Command) -> Command:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if isinstance(path, (str, Path)) and str(path).startswith(("d/", os.path.abspath("d") + "/")):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *rest, **options)

        return call

    with monkeypatch.context() as patched:
        for name in ("stat", "lstat", "open", "scandir", "listdir"):
            patched.setattr(os, name, denying(getattr(os, name)))
        patched.setattr("builtins.open", denying(open))
        patched.setattr("io.open", denying(open))
        result = hflow(*readers("d/x")[kind])
    refused(result, "d/x", "Permission denied")
    assert tree() == before


@pytest.mark.parametrize(
    "arguments", [("encode", ""), ("train", "--data", ""), ("export", "", "--json"), ("sample", "-o", "")]
)
def test_an_empty_argument_is_not_the_current_folder(hflow: Command, run: Path, arguments: tuple[str, ...]) -> None:
    before = tree()
    result = hflow(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: an argument is empty; if it comes from a variable of the shell, set it\n"
    assert tree() == before


@pytest.mark.parametrize("name", [b"\xff\xe9.png", b"a\x1b[31mred.png", b"a\nb.png", "a\u202egnp.png".encode()])
def test_names_the_terminal_cannot_show(run: Path, photo: Command, name: bytes) -> None:
    photo("photo.png")
    os.rename(b"photo.png", name)
    command = [os.fsencode(sys.executable), b"-m", b"hflow_rt.cli", b"encode", name, b"--picture", b"p.png"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("utf-8")
    shown = {b"\xff\xe9.png": r"\xff\xe9.png", b"a\x1b[31mred.png": r"a\x1b[31mred.png", b"a\nb.png": r"a\nb.png"}
    assert text.startswith(shown.get(name, r"a\u202egnp.png") + ": ")
    assert all(line.isprintable() for line in text.splitlines())
    listed = json.loads(subprocess.run([*command, b"--json"], capture_output=True, env=environment, check=True).stdout)
    assert listed["images"] == [shown.get(name, r"a\u202egnp.png")]


def test_a_name_in_an_error_is_shown_as_well(hflow: Command, run: Path) -> None:
    result = hflow("encode", "a\x1b[2J\nb.png")
    refused(result, r"a\x1b[2J")
    assert "\x1b" not in result.err
    assert len(result.err.splitlines()) <= 2  # what model it is, and the error


def test_next_commands_can_be_pasted(hflow: Command, run: Path) -> None:
    named = "my runs/it's $HOME"
    Path("my runs").mkdir()
    run.rename(named)
    lines = [
        *ok(hflow("sample", named, "-n", 1)).out.splitlines(),
        *ok(hflow("info", named)).out.splitlines(),
        *ok(hflow("walk", "--model", named, "--frames", 2, "--keyframes", 2)).out.splitlines(),
    ]
    commands = [line.removeprefix("next:").strip() for line in lines if line.startswith(("next:", "      "))]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "hflow-rt"
        assert any(word in (named, f"{named}/bundle") for word in words), command


def test_what_cannot_be_written_is_not_told_to_free_space(hflow: Command, run: Path) -> None:
    refused(hflow("sample", "-n", 1, "-o", "/proc/hflow.png"), "cannot write /proc/hflow.png: ")
    assert "free space" not in hflow("sample", "-n", 1, "-o", "/proc/hflow.png").err
