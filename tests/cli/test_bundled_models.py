"""The models that ship are found by their names, by every command that takes a model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, refused
from outcomes import pixels as drawn

import hflow_rt
from hflow_rt.assets import bundled_models, is_installed, pretrained, resolved
from hflow_rt.errors import ConfigError

NAMES = ("glow-emoji", "hflow-emoji", "ihdm-emoji", "nvae-emoji")

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_names() -> None:
    assert bundled_models() == NAMES
    assert pretrained() == pretrained("ihdm-emoji")
    assert [pretrained(name).name for name in NAMES] == list(NAMES)
    with pytest.raises(ConfigError, match=f"no bundled model is called 'emoji'; the bundled models are {NAMES[0]}, "):
        pretrained("emoji")
    with pytest.raises(ConfigError, match=r"no bundled model is called '\.\./assets/hflow-emoji'"):
        pretrained("../assets/hflow-emoji")


def test_what_is_in_the_folder_goes_first(tmp_path: Path) -> None:
    assert resolved(Path("glow-emoji")) == pretrained("glow-emoji")
    assert resolved(Path("runs/glow-emoji")) == Path("runs/glow-emoji")
    assert is_installed(pretrained("glow-emoji"))
    Path("glow-emoji").mkdir()
    assert resolved(Path("glow-emoji")) == Path("glow-emoji")
    assert not is_installed(Path("glow-emoji"))


def test_a_folder_of_that_name_is_the_model(hflow: Command, tiny_run: Path) -> None:
    shutil.copytree(tiny_run, "ihdm-emoji")
    result = ok(hflow("sample", "ihdm-emoji", "-n", 1))
    assert result.err.startswith("ihdm-emoji is the one in this folder\n")
    assert "from ihdm-emoji/bundle on onnxruntime" in result.err


@pytest.mark.parametrize(("name", "more"), [(name, ["--steps", "3"] * (name == "ihdm-emoji")) for name in NAMES])
def test_samples_are_those_of_the_session(hflow: Command, name: str, more: list[str]) -> None:
    result = ok(hflow("sample", "--model", name, "-n", 1, "--seed", 5, "-o", "one", *more))
    assert result.err.startswith(f"{name} is the bundled model\n")
    assert f"--model {name}" in result.out
    session = hflow_rt.load(name, device="cpu")
    pixels = session.sample(1, seed=5, **({"steps": int(more[1])} if more else {}))[0].transpose(1, 2, 0)
    (path,) = Path("one").iterdir()
    assert (drawn(path) == np.rint(pixels * 255)).all()


def test_the_model_as_an_option(hflow: Command, tiny_run: Path) -> None:
    shown = ok(hflow("info", tiny_run, "--json")).out
    for words in (["--model", tiny_run], [f"--model={tiny_run}"], ["-m", tiny_run]):
        assert ok(hflow("info", *words, "--json")).out == shown
    assert hflow("info", "--model").code == 2
    assert hflow("info", tiny_run, "--model", tiny_run).code == 2


def test_a_name_that_none_has(hflow: Command) -> None:
    refused(hflow("sample", "emoji"), f"emoji does not exist; name a run, a bundle or one of {', '.join(NAMES)}")


def test_the_installed_one_stays(hflow: Command) -> None:
    result = hflow("export", "glow-emoji")
    assert result.err.startswith("glow-emoji is the bundled model\n")
    refused(result, "was installed and must stay as it is; say where the engines go with --out")


def test_going_on_from_one(hflow: Command) -> None:
    from hflow_rt.training.prepare import prepare

    result = hflow("train", "--from", "glow-emoji", "--out", "run")
    assert result.err.startswith("glow-emoji is the bundled model\n")
    refused(result, "holds no settings of a training run; name some with --preset or --config")
    begun = prepare("glow-emoji", out="run", start="glow-emoji")
    assert begun.weights == pretrained("glow-emoji") / "model.safetensors"


def test_info_lists_them(hflow: Command) -> None:
    found = json.loads(ok(hflow("info", "--models", "--json")).out)
    assert found["default"] == "ihdm-emoji"
    assert [row["name"] for row in found["models"]] == list(NAMES)
    glow = found["models"][0]
    assert glow | {"bytes": 0} == {
        "name": "glow-emoji",
        "family": "glow",
        "resolution": 64,
        "channels": 3,
        "parameters": glow["parameters"],
        "bytes": 0,
        "about": glow["about"],
    }
    assert glow["bytes"] == sum(path.stat().st_size for path in pretrained("glow-emoji").iterdir())
    lines = ok(hflow("info", "--models")).out.splitlines()
    pattern = r"(\S+) +(\S+) +64x64 +\d\.\d\d M parameters +\d+\.\d MB  An? .+\."
    matched = [re.fullmatch(pattern, line) for line in lines[:-1]]
    assert [found and found[1] for found in matched] == list(NAMES)
    assert lines[-1] == "next: hflow-rt sample --model nvae-emoji"
    refused(hflow("info", "--models", "--presets"), "--presets and --models list different things; give one")
    refused(hflow("info", "here", "--models"), "--models lists all of them; omit here")
