"""A Glow run in place of an hflow run: every command as typed, without an option that says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, pixels
from PIL import Image

from hflow_rt.runtime.latents.files import load_latents

Command = Callable[..., Any]
SMALL = (
    "model.resolution=16", "model.levels=2", "model.steps=1", "model.hidden_channels=8", "training.batch_size=4",
    "training.init_images=8", "training.warmup_images=16",
)  # fmt: skip


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


def test_a_glow_run_is_used_like_any_other(hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", 20, ("all",))
    report = json.loads(train(hflow, tmp_path / "data").out)
    assert report["images"] == 64
    (strict, paper), first = report["final"]["figures"].values(), report["initial"]["figures"]["strict"]
    assert strict["mean"] < first["mean"] < 20
    assert paper["mean"] == pytest.approx(strict["mean"], abs=0.5)
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
    ok(hflow("temperature", "data/all/0.png", "data/all/1.png", "--at", "0,0.5,1", "-o", "temperature.png"))
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
    assert "  labels: red, blue\n" in ok(hflow("info")).out
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
    classes_by_place(hflow)
    latent_tools_of_classes(hflow)
    shutil.copy("data/red/0.png", "0.png")
    shards_of_classes(hflow)
    for arguments, message in (
        (("encode", "0.png"), "images need a folder named after one of the labels (red, blue); '0.png' is in none;"),
        (("zeroing",), "put it there, or say --label"),
        (("sample", "--label", "green"), "unknown option 'green' of labels; known: red, blue"),
    ):
        result = hflow(*arguments)
        assert result.code == 1
        assert message in result.err


def classes_by_place(hflow: Command) -> None:
    """A file and a class's own folder are of that class, as they are within the whole set; --label overrules."""
    for place, count, expected in (("data/red/0.png", 1, 0), ("data/blue/0.png", 1, 1), ("data/blue", 10, 1)):
        ok(hflow("encode", place, "-o", "z.safetensors"))
        assert load_latents(Path("z.safetensors"))[0]["labels"].argmax(1).tolist() == [expected] * count
    ok(hflow("encode", "data/red/0.png", "--label", "blue", "-o", "z.safetensors"))
    assert load_latents(Path("z.safetensors"))[0]["labels"].tolist() == [[0, 1]]


def shards_of_classes(hflow: Command) -> None:
    """The likelihood of an image is of its own class; what has none is a row with the reason, if it is not all."""
    parquet = pytest.importorskip("pyarrow.parquet")
    shutil.copytree("data", "jobs/data")
    shutil.copy("0.png", "jobs/data/stray.png")
    for out, words in (("own", ()), ("blue", ("--label", "blue"))):
        assert "refused" in ok(hflow("score", "jobs/data", *words, "--keep", "log_prob,labels", "-o", out)).out or words
        (rows,) = (parquet.read_table(path).to_pylist() for path in Path(out).glob("*.parquet"))
        found = {row["name"]: row for row in rows}
        assert found["red/0.png"]["labels"] == ([0, 1] if words else [1, 0])
        assert found["blue/0.png"]["labels"] == [0, 1]
        assert ("is in none" in (found["stray.png"]["reason"] or "")) == (not words)
        ok(hflow("encode", "jobs/data/red/0.png", *words, "-o", "one.safetensors"))
        expected = load_latents(Path("one.safetensors"))[1]["log_prob"][0]
        assert found["red/0.png"]["log_prob"] == pytest.approx(expected, rel=1e-4)
    ok(hflow("encode", "jobs/data/blue", "--shards", 2, "-o", "of-blue"))
    assert load_latents(Path("of-blue/00002-of-00002.safetensors"))[0]["labels"].tolist() == [[0, 1]] * 5
    Path("plain").mkdir()
    shutil.copy("0.png", "plain/0.png")
    result = hflow("score", "plain", "-o", "none")
    assert "images need a folder named after a class (red, blue); make one, or say --label" in result.err
    assert not Path("none").exists()


def latent_tools_of_classes(hflow: Command) -> None:
    for backend in ("onnx", "torch"):
        for words in (
            "walk --rows 1 --columns 1 --keyframes 2 --frames 2 -o w.png",
            "walk --rows 1 --columns 1 --keyframes 2 --frames 2 --label blue -o w.png",
            "seeds 0-3 --label blue -o s.png",
            "heatmap -n 2 --draws 2 -o h.png",
            "heatmap data/red/0.png --draws 2 -o h.png",
            "zeroing data/red data/blue -n 4 -o zero.png",
            "zeroing --samples -n 2 --label red -o zero.png",
            "mix --rows 0-1 --columns 2-3 -o m.png",
            "mix --row-images data/red/0.png --column-images data/blue -o m.png",
            "neighbours --samples 3 --data data -k 2 -o n.png",
            "neighbours data/red/1.png --data data/red -k 2 -o n.png",
            "neighbours --samples 1 --label red -k 2 -o n.png",
            "attribute make data/red data/blue -o a.safetensors",
            "attribute apply a.safetensors data/red/2.png --gain -1,0,1 -o a.png",
            "attribute apply a.safetensors -n 2 --label blue --gain 1 -o a.png",
            "temperature data/blue -n 2 --at 0,1 -o t.png",
            "interpolate data/red/0.png data/blue/0.png --mode slerp --frames 3 -o i.png",
            "interpolate --mode slerp --frames 3 -o i.png",
        ):
            ok(hflow(*words.split(), "--backend", backend))
    found = json.loads(ok(hflow("neighbours", "data/red/1.png", "--data", "data", "-k", 1, "--json")).out)
    assert found["nearest"][0][found["in"]][0] == {"image": "red/1.png", "distance": 0.0}


def test_training_needs_the_folders_of_its_classes(
    hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "data", 4, ("red", "green"))
    options = [part for setting in (*SMALL, 'model.classes=["red"]') for part in ("--set", setting)]
    result = hflow("train", "--preset", "glow-demo", "--data", "data", "--images", 8, "--out", "run", *options)
    assert result.code == 1
    assert "images need a folder named after one of the labels (red); 'green/" in result.err
