"""A Glow run in place of an hflow run: every command as typed, without an option that says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hflow_rt.runtime.latents import load_latents

Command = Callable[..., Any]
SMALL = (
    "model.resolution=16", "model.levels=2", "model.steps=1", "model.hidden_channels=8", "training.batch_size=4",
    "training.init_images=8", "training.warmup_images=16",
)  # fmt: skip


def ok(result: Any) -> Any:
    assert result.code == 0, result.err
    return result


def pictures(folder: Path, count: int, names: tuple[str, ...]) -> None:
    """Smooth pictures in a folder for each name, redder in the first, bluer in the last."""
    rng = np.random.default_rng(0)
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            corners = rng.integers(60, 190, (2, 2, 3))
            corners[..., 0 if place == 0 else 2] += 60
            image = Image.fromarray(corners.astype(np.uint8)).resize((16, 16), Image.Resampling.BILINEAR)
            image.save(folder / name / f"{index}.png")


def train(hflow: Command, data: Path, *settings: str) -> Any:
    options = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    preset = ("--preset", "glow-demo", "--data", data, "--images", 64)
    return ok(hflow("train", *preset, "--out", "runs/glow", "--json", *options))


def pixels(path: str) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_glow_run_is_used_like_any_other(hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", 20, ("all",))
    report = json.loads(train(hflow, tmp_path / "data").out)
    assert report["images"] == 64
    assert report["final"]["strict"] < report["initial"]["strict"] < 20
    assert report["final"]["paper"] == pytest.approx(report["final"]["strict"], abs=0.5)
    assert ok(hflow("train", "--resume", "runs/glow", "--images", 80)).out.startswith("runs/glow: 80 images")
    assert "verified" not in ok(hflow("info")).out
    exported = ok(hflow("export", "--bound"))
    assert "NOT VERIFIED" not in exported.out
    about = ok(hflow("info")).out
    for text in ("runs/glow: glow", "latent z1: 24x4x4", ", verified"):
        assert text in about
    assert ok(hflow("check")).code == 0
    ok(hflow("sample", "-n", 4, "-o", "samples.png", "--latents", "drawn.safetensors"))
    assert list(load_latents(Path("drawn.safetensors"))[0]) == ["z1", "z0"]
    encoded = ok(hflow("encode", "data/all/0.png", "data/all/1.png", "-o", "z.safetensors", "--picture", "back.png"))
    assert "bits/dim" in encoded.out
    ok(hflow("decode", "z.safetensors", "-o", "decoded"))
    for index in range(2):
        assert np.array_equal(pixels(f"decoded/{index:06d}.png"), pixels(f"data/all/{index}.png"))
    ok(hflow("interpolate", "data/all/0.png", "data/all/1.png", "--frames", 3, "-o", "walk.png"))
    by_torch = json.loads(ok(hflow("eval", "bpd", "--data", "data", "--json")).out)
    by_onnx = json.loads(ok(hflow("eval", "bpd", "--data", "data", "--json", "--backend", "onnx")).out)
    assert by_torch["strict"]["mean"] == pytest.approx(by_onnx["strict"]["mean"], abs=1e-4)
    assert list(by_torch["strict"]["latents"]) == ["z1", "z0"]


def test_classes_come_from_folders(hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", 10, ("red", "blue"))
    classes = 'model.classes=["red", "blue"]'
    train(hflow, tmp_path / "data", classes, "model.classifier=true")
    ok(hflow("export"))
    ok(hflow("sample", "-n", 4, "--label", "red", "-o", "red.png", "--latents", "red.safetensors"))
    assert np.array_equal(load_latents(Path("red.safetensors"))[0]["labels"], np.tile([1, 0], (4, 1)))
    ok(hflow("sample", "-n", 4, "-o", "both.png", "--latents", "both.safetensors"))
    assert load_latents(Path("both.safetensors"))[0]["labels"].argmax(1).tolist() == [0, 1, 0, 1]
    ok(hflow("encode", "data", "-o", "z.safetensors"))
    values, found = load_latents(Path("z.safetensors"))
    expected = [["red", "blue"].index(name.split("/")[0]) for name in found["images"]]
    assert values["labels"].argmax(1).tolist() == expected
    ok(hflow("decode", "z.safetensors", "-o", "decoded"))
    assert np.array_equal(pixels("decoded/000000.png"), pixels(f"data/{found['images'][0]}"))
    one = ok(hflow("encode", "data/red/0.png", "--label", "red", "-o", "one.safetensors")).out
    other = ok(hflow("encode", "data/red/0.png", "--label", "blue", "-o", "two.safetensors")).out
    assert one.splitlines()[0] != other.splitlines()[0]
    ok(hflow("interpolate", "--label", "blue", "--frames", 3, "-o", "walk.png"))
    measured = json.loads(ok(hflow("eval", "bpd", "--data", "data", "--json")).out)
    assert measured["strict"] is not None
    for arguments, message in (
        (("encode", "data/red/0.png"), "images need a folder named after one of the labels (red, blue)"),
        (("sample", "--label", "green"), "unknown option 'green' of labels; known: red, blue"),
    ):
        result = hflow(*arguments)
        assert result.code == 1
        assert message in result.err


def test_training_needs_the_folders_of_its_classes(
    hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", 4, ("red", "green"))
    options = [part for setting in (*SMALL, 'model.classes=["red"]') for part in ("--set", setting)]
    result = hflow("train", "--preset", "glow-demo", "--data", "data", "--images", 8, "--out", "run", *options)
    assert result.code == 1
    assert "images need a folder named after one of the labels (red); 'green/" in result.err
