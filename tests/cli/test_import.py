"""`hflow-rt import`, and every command that a run must serve afterwards."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from hflow_rt.models.checkpoint import read_metadata

Command = Callable[..., Any]
GOLDEN = Path(__file__).parents[1] / "golden" / "hflow"
ATTACKS = Path(__file__).parents[1] / "attacks"


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published checkpoint in a working folder of the test's own."""
    monkeypatch.syspath_prepend(ATTACKS)
    monkeypatch.chdir(tmp_path)
    from generators import published

    settings = json.loads((GOLDEN / "tiny32.json").read_text())["config"]
    Path("settings.json").write_text(json.dumps(settings))
    Path("model_iter_9.bin").write_bytes(published(load_file(GOLDEN / "tiny32.weights.safetensors"), settings))
    return Path("model_iter_9.bin")


def failed(result: Any, *parts: str) -> None:
    assert result.code == 1, result.out
    assert result.out == ""
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last
    assert not Path("runs").exists()


def test_a_container_becomes_a_run(hflow: Command, container: Path) -> None:
    done = hflow("import", container, "--family", "hflow")
    assert done.code == 0, done.err
    first, dropped, note, following = done.out.splitlines()
    weights = json.loads((GOLDEN / "tiny32.json").read_text())["weights"]
    counts = f"{weights['trainable']:,} tensors of {weights['trainable_values']:,} values"
    assert first == f"runs/model_iter_9: hflow 32x32, {counts} read, each accounted for"
    assert dropped.startswith("dropped because they are recomputed: 8 blur kernels, ")
    assert dropped.endswith(" masks")
    assert note.startswith("note: noise scales are not in published files and stay at 1, ")
    assert following == "next: hflow-rt export runs/model_iter_9"
    assert {path.name for path in Path("runs").rglob("*")} == {"model_iter_9", "model.safetensors"}

    assert "imported_from: file model_iter_9.bin, " in hflow("info").out
    before = Path("runs/model_iter_9/model.safetensors").read_bytes()
    again = hflow("import", container)
    assert again.code == 1
    assert again.err.splitlines()[-1] == "error: runs/model_iter_9 exists already; choose another --output"
    assert Path("runs/model_iter_9/model.safetensors").read_bytes() == before


def test_an_imported_run_is_exported_and_sampled(
    hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = GOLDEN.parent / "glow" / "paper_shuffle.weights.safetensors"
    Path("settings.json").write_text(json.dumps({"resolution": 16, "bits": 5}))
    imported = hflow("import", weights, "--family", "glow", "--settings", "settings.json", "-o", "runs/glow")
    assert imported.code == 0, imported.err
    exported = hflow("export")
    assert exported.code == 0, exported.err
    assert "verified: the engines are the model" in exported.out
    assert hflow("sample", "-n", 4, "-o", "four.png").code == 0
    with Image.open("four.png") as picture:
        assert picture.width >= 32


def test_there_is_nothing_to_resume(hflow: Command, container: Path) -> None:
    hflow("import", container)
    result = hflow("train", "--resume", "runs/model_iter_9")
    assert result.code == 1
    assert result.err.startswith("error: runs/model_iter_9 ")
    assert "run.json" in result.err


def test_json_and_images(hflow: Command, container: Path) -> None:
    for index in range(4):
        folder = Path("photos", "train" if index else "test")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{index}.png")
    shutil.copy(GOLDEN / "tiny32.weights.safetensors", "weights.safetensors")
    options = ("--settings", "settings.json", "--images", "photos", "-o", "made", "--json")
    result = hflow("import", "weights.safetensors", *options)
    assert result.code == 0, result.err
    assert result.err == ""
    found = json.loads(result.out)
    assert found["run"] == "made"
    assert found["resolution"] == 32
    split = "3 images to train on, 1 held out, by the folders train/ and test/"
    known = {"what": "noise scales", "source": "photos", "images": 3, "held_out": 1, "split": split}
    assert found["learned"] == known
    assert found["notes"] == ["noise scales are of the training part of photos; 1 held-out images were left out"]
    about = read_metadata(Path("made/model.safetensors"))
    assert about["learned"] == found["learned"]
    assert about["imported_from"]["sha256"] == found["sha256"]


def test_weights_below_another_key(hflow: Command, container: Path) -> None:
    weights = {
        name: torch.from_numpy(value) for name, value in load_file(GOLDEN / "tiny32.weights.safetensors").items()
    }
    named = {f"module.{name}": value for name, value in weights.items()}
    optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
    torch.save({"model": named, "optimizer": optimizer, "iteration": 5}, "model.pt")
    done = hflow("import", "model.pt", "--settings", "settings.json", "-o", "made")
    assert done.code == 0, done.err
    first, taken, prefix, passed_over, *_ = done.out.splitlines()
    assert first.endswith(" values read")  # not each tensor of the file is accounted for
    assert taken == "weights taken from model"
    assert prefix == "names begin with module., taken off"
    assert passed_over == "passed over: optimizer (an optimizer's state), iteration (a number)"
    about = read_metadata(Path("made/model.safetensors"))
    assert (about["imported_from"]["part"], about["imported_from"]["prefix"]) == ("model", "module.")

    torch.save({"model": weights, "model_ema": {name: value.neg() for name, value in weights.items()}}, "two.pt")
    failed(
        hflow("import", "two.pt", "--settings", "settings.json"), "choose one with --part NAME", "(model, model_ema)"
    )
    options = ("--settings", "settings.json", "--json", "--part")
    found = json.loads(hflow("import", "two.pt", *options, "model_ema", "-o", "ema").out)
    assert (found["part"], found["prefix"]) == ("model_ema", "")
    assert found["passed_over"] == {"model": f"{len(weights)} tensors"}
    plain, ema = (load_file(Path(name, "model.safetensors")) for name in ("made", "ema"))
    for name, value in plain.items():
        np.testing.assert_array_equal(ema[name], value if name.startswith("spread_") else -value)


def test_path_that_cannot_be_asked(hflow: Command, container: Path) -> None:
    failed(hflow("import", "n" * 300), ": File name too long")
    failed(hflow("import", container / "x"), "no file at model_iter_9.bin/x")
    failed(hflow("import", container, "--settings", "n" * 300), ": File name too long")
    os.mkfifo("pipe")
    failed(hflow("import", "pipe"), "no file at pipe")


def test_bad_input_is_one_line(hflow: Command, container: Path) -> None:
    failed(hflow("import", "nowhere.bin"), "no file at nowhere.bin")
    failed(hflow("import", "."), "no file at .")
    failed(hflow("import", container, "--family", "someflow"), "unknown model family 'someflow'; known: ")
    failed(hflow("import", container, "--settings", "nowhere.json"), "no settings file at nowhere.json")
    failed(hflow("import", container, "--settings", container), "settings must be at most 1 MB of JSON")
    failed(hflow("import", container, "--images", "nowhere"), "nowhere")
    shutil.copy(GOLDEN / "tiny32.weights.safetensors", "weights.safetensors")
    failed(hflow("import", "weights.safetensors"), "give the original's JSON with --settings FILE")
    os.truncate(container, 100_000)
    failed(hflow("import", container), "model_iter_9.bin is not a whole model file (")
    container.write_bytes(b"words")
    failed(hflow("import", container), "is no model file: it must be .safetensors or made by torch.save")
