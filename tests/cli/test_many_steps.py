"""What commands do with a model of many steps: fewer steps, exact encodings, controls, the latent tools, bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, pixels, refused
from PIL import Image

from hflow_rt.runtime import load
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.files import load_latents, save_latents

Command = Callable[..., Any]


@pytest.fixture
def model(many_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the latest run, beside a folder of pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copytree(many_steps, "runs/many")
    Path("photos").mkdir()
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(f"photos/{name}.png")
    return Path("runs/many")


def test_samples_in_fewer_steps(hflow: Command, model: Path) -> None:
    words = ["sample", "-n", 3, "--seed", 4, "--steps", 2, "-o", "s/", "--latents", "l.safetensors", "--json"]
    assert json.loads(ok(hflow(*words, "--control", "delta=0.1")).out)["steps"] == 2
    expected = to_uint8(load(model, device="cpu").sample(3, seed=4, steps=2, controls={"delta": 0.1}))
    np.testing.assert_array_equal(pixels("s/000002.png"), expected[2])
    latents, about = load_latents("l.safetensors")
    assert latents["noise"].shape == (3, 2, 3, 8, 8)
    assert (about["steps"], about["controls"]) == (2, {"delta": 0.1})
    ok(hflow("decode", "l.safetensors", "-o", "d/"))
    np.testing.assert_array_equal(pixels("d/000002.png"), expected[2])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sample", "--steps", 5], "the number of steps must be at most 4, of this ihdm model; found 5"),
        (["sample", "--steps", 0], "the number of steps must be at least 1"),
        (["sample", "--control", "delta=-1"], "control delta must be a number in 0.0001 .. 1; found -1"),
        (["encode", "photos/a.png", "--control", "delta=0"], "control delta must be a number in 0.0001 .. 1; found 0"),
        (["sample", "--std", "0.7"], "no std applies to the latents of this ihdm model; omit it; it has delta to set"),
        (["mix", "--cut", "noise:5"], "'noise:5' must name 1 .. 4 calls of 'noise'"),
        (["mix", "--cut", "start:1"], "'start' is not of every call; give its name alone"),
        (["mix", "--cut", "z0"], "unknown latent 'z0'; choose among start, start_noise, residual, noise"),
        (["heatmap", "--redraw-std", 1], "no std applies to the latents of this ihdm model"),
    ],
)
def test_refused_in_one_line(hflow: Command, model: Path, words: list[object], line: str) -> None:
    refused(hflow(*words), line)


def test_encoding_is_decoded_at_once_and_remembered(hflow: Command, model: Path) -> None:
    words = ["encode", "photos", "-o", "l.safetensors", "--control", "delta=0.3"]
    result = ok(hflow(*words))
    assert "3 of 3 images come back in every 8-bit value on onnxruntime CPUExecutionProvider\n" in result.out
    report = json.loads(ok(hflow(*words, "--json")).out)
    trip = {"backend": "onnxruntime CPUExecutionProvider", "batch": 3, "largest_difference": [0, 0, 0]}
    assert report["round_trip"] == trip
    latents, about = load_latents("l.safetensors")
    assert (about["round_trip"], about["controls"]) == (trip, {"delta": 0.3})
    ok(hflow("decode", "l.safetensors", "-o", "d/"))
    for index, name in enumerate("abc"):
        np.testing.assert_array_equal(pixels(f"d/{index:06d}.png"), pixels(f"photos/{name}.png"))
    other = ok(hflow("decode", "l.safetensors", "-o", "t/", "--backend", "torch", "--device", "cpu"))
    assert "note: what l.safetensors says of exactness holds on onnxruntime CPU" in other.err
    # without what was set they lead elsewhere
    save_latents("bare.safetensors", latents, {key: value for key, value in about.items() if key != "controls"})
    ok(hflow("decode", "bare.safetensors", "-o", "e/"))
    assert np.abs(pixels("e/000000.png").astype(int) - pixels("photos/a.png")).max() > 8


def test_check_says_what_comes_back(hflow: Command, model: Path) -> None:
    result = ok(hflow("check", "--backend", "torch", "--device", "cpu", "--images", "photos"))
    assert "  read off in sequence, 2 of 2 images come back in every 8-bit value on torch cpu\n" in result.out
    assert "  forward in 3 steps image" in result.out


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda latents: latents | {"noise": latents["noise"][:, :3]}, "noise is [3, 3, 8, 8] there and [4, 3, 8, 8]"),
        (lambda latents: latents | {"start": latents["start"][..., :2]}, "start is [3, 2] there and [3, "),
    ],
)
def test_latents_of_another_model(hflow: Command, model: Path, change: Any, line: str) -> None:
    latents, _ = load_latents(sampled(hflow))
    save_latents("other.safetensors", change(latents), {})
    refused(hflow("decode", "other.safetensors"), line)


def sampled(hflow: Command) -> str:
    ok(hflow("sample", "-n", 1, "--latents", "l.safetensors"))
    return "l.safetensors"


def test_a_bank_that_is_missing_or_changed(hflow: Command, model: Path) -> None:
    bank = model / "bundle" / "bank.safetensors"
    content = bank.read_bytes()
    bank.write_bytes(content[:-4] + b"\0\0\0?")
    refused(hflow("sample"), "bank.safetensors was changed after export")
    bank.write_bytes(content[:-4])
    refused(hflow("sample"), "it was cut or replaced; export again")
    bank.unlink()
    refused(hflow("sample"), "has no bank.safetensors; export again with")


def test_latent_tools(hflow: Command, model: Path) -> None:
    """Each on real images, where it takes any, with levels of the loop among what is mixed and zeroed."""
    session = load(model, device="cpu")
    ok(hflow("interpolate", "photos/a.png", "photos/b.png", "--frames", 2, "--no-loop", "-o", "i.gif"))
    report = json.loads(ok(hflow("mix", "--row-images", "photos/a.png", "--column-images", "photos/b.png", "--json",
                                 "--cut", "noise:4")).out)  # fmt: skip
    assert report["from_rows"] == ["start", "start_noise", "residual", "noise:4"]
    names = ["start", "start_noise", "residual", "noise"]
    report = json.loads(ok(hflow("zeroing", "photos", "--json")).out)
    zeroed = ["-noise", "-noise residual", "-noise residual start_noise", "all zero (mean image)"]
    assert list(report["rms_change"]) == ["original", *zeroed]
    assert report["rms_change"]["original"] < 1e-5 < 1e-3 < report["rms_change"]["-noise"]
    report = json.loads(ok(hflow("heatmap", "--draws", 3, "--json")).out)
    assert list(report["maps"][0]["mean_std"]) == names
    assert report["maps"][0]["mean_std"]["residual"] == 0 < report["maps"][0]["mean_std"]["noise"]
    report = json.loads(ok(hflow("neighbours", "photos/b.png", "--data", "photos", "-k", 2, "--json")).out)
    assert (report["in"], report["nearest"][0]["start"][0]["image"]) == ("start", "b.png")
    assert report["nearest"][0]["start"][0]["distance"] == 0
    report = json.loads(ok(hflow("temperature", "photos/a.png", "--at", "0,1", "--json")).out)
    assert report["rms_change"][1] < 1e-2 < report["rms_change"][0]
    ok(hflow("walk", "--rows", 1, "--columns", 1, "--keyframes", 2, "--frames", 2, "--fix", "noise", "-o", "w.png"))
    for name in ("p", "q"):
        Path(name).mkdir()
    for name in "abc":
        colour = np.asarray(Image.open(f"photos/{name}.png")) // 2
        Image.fromarray(colour).save(f"p/{name}.png")
        Image.fromarray(colour + 128).save(f"q/{name}.png")
    report = json.loads(ok(hflow("attribute", "make", "q", "p", "-o", "t.safetensors", "--json")).out)
    assert (report["name"], report["space"]) == ("start", "z")
    bright = session.inverse(session.read("q")).latents["start"] - session.inverse(session.read("p")).latents["start"]
    assert report["norm"] == pytest.approx(float(np.linalg.norm(bright.mean(0))), rel=1e-3)
    ok(hflow("attribute", "apply", "t.safetensors", "photos/a.png", "--gain", "0,1"))
    line = "nothing is called 'noise' in this model; choose among start, start_noise, residual"
    refused(hflow("attribute", "make", "q", "p", "--in", "noise", "-o", "u.safetensors"), line)


@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_trajectories(hflow: Command, model: Path, suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av")
    result = ok(hflow("sample", "-n", 2, "--steps", 3, "--trajectory", f"t{suffix}"))
    assert f"how they came to be: t{suffix}" in result.out
    assert Path(f"t{suffix}").stat().st_size > 100
