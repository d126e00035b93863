"""The commands that look into latents: their help, what they need, and what they refuse."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import ok, refused

Command = Callable[..., Any]
COMMANDS = (
    "walk",
    "heatmap",
    "zeroing",
    "seeds",
    "mix",
    "neighbours",
    "attribute",
    "attribute make",
    "attribute apply",
)


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(hflow: Command, command: str) -> None:
    text = ok(hflow(*command.split(), "--help")).out
    assert re.search(rf"Example: hflow-rt {command}\b", text)


def test_help_has_a_panel_for_them(hflow: Command) -> None:
    text = ok(hflow("--help")).out
    panel = text.partition(" Latents ")[2]
    assert all(re.search(rf"^\W*{command.split()[0]}\b", panel, re.MULTILINE) for command in COMMANDS)


def test_none_of_them_needs_torch(python: Command, run: Path, sets: None) -> None:
    code = """
import sys
from hflow_rt.cli.__main__ import main
for command in sys.argv[1].split(";"):
    sys.argv = ["hflow-rt", *command.split()]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, command
print("imported:", sorted({"torch", "onnx", "triton", "av", "accelerate"} & sys.modules.keys()))
"""
    commands = (
        "walk --keyframes 2 --frames 2 -o walk.gif", "heatmap --draws 2", "zeroing --samples -n 1", "seeds 0-2",
        "mix --rows 0 --columns 1", "neighbours --samples 1 --data dark", "attribute make bright dark",
        "attribute apply attribute.safetensors -n 1",
    )  # fmt: skip
    assert ok(python(code, ";".join(commands))).out.endswith("imported: []\n")


# bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("walk -o walk.avi", "an animation must end in .gif, .webp, .mp4, .png; found 'walk.avi'"),
        ("walk --fps 0", ".webp needs 0.1 .. 240 frames per second; found 0.0"),
        ("walk --rows 0", "the number of rows must be at least 1, not 0"),
        ("walk --keyframes 1", "at least 2 keyframes and 1 frame per segment; found 1 and 24"),
        ("walk --fix u1", "unknown latent 'u1'; choose among end0, end1, z1, z0"),
        ("walk --space w", "unknown space 'w' for this hflow model; known: z, y0"),
        ("walk --mode cubic", "interpolation mode must be one of lerp, slerp; found 'cubic'"),
        ("heatmap -o a.txt", "a picture's name must end in"),
        ("heatmap --draws 1", "at least 2 redraws, not 1"),
        ("heatmap --redraw-std 0", "std must be a finite number > 0; found '0.0'"),
        ("heatmap -n 0", "number of images must be at least 1, not 0"),
        ("heatmap a.png --std 1", "--std is for samples, and these are images; omit it"),
        ("heatmap nowhere.png", "no image at nowhere.png"),
        ("zeroing -n 0", "number of images must be at least 1, not 0"),
        ("zeroing --samples -n 0", "number of images must be at least 1, not 0"),
        ("zeroing a.png --samples", "images and --samples both say what to start from"),
        ("zeroing --std 1", "these are images; ask for samples with --samples or omit it"),
        ("seeds 5-2", "a range of seeds goes up; found '5-2'; write 2-5"),
        ("seeds x", "numbers and ranges such as 7 or 0-15; found 'x'"),
        ("seeds 18446744073709551616", "seed must be in 0 .. 2^64 - 1"),
        ("seeds --columns 0", "the number of columns must be at least 1, not 0"),
        ("mix --rows x", "found 'x'"),
        ("mix --cut u1", "unknown latent 'u1'; choose among end0, end1, z1, z0"),
        ("mix --from-rows u1", "unknown latent 'u1'; choose among end0, end1, z1, z0"),
        ("mix --cut z1 --from-rows z0", "--cut, --from-rows and --slots each say what the rows give"),
        ("mix --rows 0 --row-images a.png", "--rows and --row-images both say what the rows are"),
        ("neighbours --samples 0", "number of images must be at least 1, not 0"),
        ("neighbours -k 0", "number of neighbours must be at least 1, not 0"),
        ("neighbours --in w", "nothing is called 'w' in this model; choose among end0, end1, z1, z0, u0, u1"),
        ("neighbours --split half", "unknown split 'half'; known: test, train, all"),
        ("neighbours --data one --split test", "one has no held-out images; give more images or another --split"),
        ("neighbours --data nowhere", "no images at nowhere"),
        ("neighbours a.png --std 1", "--std is for samples, and these are images; omit it"),
        ("interpolate a.png a.png --std 1", "--std is for samples, and these are images; omit it"),
        ("attribute make nowhere dark", "no image at nowhere"),
        ("attribute make bright bright", "the two sets need different means and different images within them"),
        ("attribute make bright dark --in w", "nothing is called 'w'"),
        ("attribute make bright dark -o a.png", "an attribute's name must end in .safetensors; found 'a.png'"),
        ("attribute make bright/0.png dark", "at least 2 images on each side; bright/0.png has 1"),
        ("attribute apply nowhere.safetensors", "no attribute at nowhere.safetensors"),
        ("attribute apply runs/tiny/model.safetensors", "runs/tiny/model.safetensors holds no attribute"),
        ("attribute apply a.safetensors --gain x", "a gain is a number, or FROM:TO:COUNT such as -2:2:5; found 'x'"),
    ],
)
def test_bad_input_is_one_line(hflow: Command, run: Path, photo: Command, sets: None, words: str, message: str) -> None:
    photo("a.png")
    photo("one/a.png")
    before = sorted(Path().rglob("*"))
    refused(hflow(*words.split()), message)
    assert sorted(Path().rglob("*")) == before


def test_a_model_larger_than_what_ships(hflow: Command, run: Path) -> None:
    manifest = run / "bundle" / "manifest.json"
    described = json.loads(manifest.read_text())
    described["resolution"] = 256
    manifest.write_text(json.dumps(described))
    for command in ("zeroing", "neighbours"):
        refused(hflow(command), "the demo images do not fit this 256x256 model; name images of your own")


@pytest.mark.parametrize("command", ["walk", "heatmap", "zeroing", "seeds", "mix", "neighbours"])
def test_without_an_exported_model(hflow: Command, run: Path, command: str) -> None:
    shutil.rmtree(run / "bundle")
    refused(hflow(command), "has no exported bundle")
