"""What people expect of any command line: a version, completion, lists, and words instead of Python's notation."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import ok, refused

from hflow_rt import __version__
from hflow_rt.cli.__main__ import COMMANDS
from hflow_rt.runs import TENSORBOARD
from hflow_rt.training.config import preset_names
from hflow_rt.training.log import Log

Command = Callable[..., Any]


def test_version(hflow: Command) -> None:
    assert ok(hflow("--version")).out == f"hflow-rt {__version__}\n"


def test_curves(hflow: Command, run: Path) -> None:
    log = Log(run / TENSORBOARD, 0, writes=True)
    for images in (100, 200):
        log.scalars({"loss": 1 / images}, images)
    log.close()
    done = ok(hflow("curves", run))
    assert done.out.startswith(f"1 curves of {run}, 200 images: curves.png\n")
    assert Path("curves.png").is_file()
    assert json.loads(ok(hflow("curves", "--json")).out)["panels"] == ["loss"]
    refused(hflow("curves", "-o", "curves.jpg"), "must end in .png; found 'curves.jpg'")


def test_completion(python: Command) -> None:
    code = """
import os, sys
os.environ["_HFLOW_RT_COMPLETE"] = "complete_bash"
os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "hflow-rt in", "1"
sys.argv = ["hflow-rt"]
from hflow_rt.cli.__main__ import main
main()
"""
    assert ok(python(code)).out.split() == ["interpolate", "info"]


def test_presets_are_listed_with_their_sizes(hflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"hflow-demo", "glow-demo", "ihdm-demo", "nvae-demo", "inrgan-demo"} < {*preset_names()}
    few = ["glow-demo", "hflow-demo"]  # the others take a while to count
    monkeypatch.setattr("hflow_rt.training.config.preset_names", lambda: few)
    found = json.loads(ok(hflow("info", "--presets", "--json")).out)["presets"]
    assert [row["preset"] for row in found] == few
    by_name = {row["preset"]: row for row in found}
    assert by_name["hflow-demo"] == {
        "preset": "hflow-demo",
        "family": "hflow",
        "resolution": 32,
        "channels": 3,
        "parameters": 1774434,
    }
    assert by_name["glow-demo"]["parameters"] == 564132
    lines = ok(hflow("info", "--presets")).out.splitlines()
    assert re.fullmatch(r"glow-demo +glow +32x32 +0\.56 M parameters", lines[0])
    assert lines[2] == "next: hflow-rt train --preset glow-demo"
    refused(hflow("info", "here", "--presets"), "--presets lists all of them; omit here")


def test_info_speaks_no_python(hflow: Command, run: Path) -> None:
    import torch  # noqa: F401 - what it warns of comes before

    about = {"images": 5, "bits_per_dim": {"initial": {"strict": 7.25, "reason": None}}, "notes": ["one", "two"]}
    from hflow_rt.models.checkpoint import load_model, read_metadata, save_model

    model = load_model(run / "model.safetensors")
    kept = {key: value for key, value in read_metadata(run / "model.safetensors").items() if key == "preset"}
    save_model(run / "model.safetensors", "hflow", model, model.state_dict(), kept | about)
    out = ok(hflow("info", run)).out
    assert "  images: 5\n" in out
    assert "  bits_per_dim initial: strict 7.25\n" in out
    assert "  notes: one; two\n" in out
    assert not re.search(r"[{}\[\]']|None|True|False", out)


# phrases of the list in the style guide, and their siblings
CLUMSY = r"leave \w+ (away|out)|left away|nobody says|else is said|so long\b|so many\b|, for (it|they) |that ships"


@pytest.mark.parametrize("command", [*COMMANDS, "check", "decode", "doctor"])
def test_help_is_plain(hflow: Command, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"import_checkpoint": ["import"], "evaluate": ["eval", "bpd"]}.get(command, [command])
    names = ["attribute", "apply"] if command == "attribute" else names
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(ok(hflow(*names, "--help")).out.split())
    assert "Usage: hflow-rt " in text
    assert not re.search(CLUMSY, text)
