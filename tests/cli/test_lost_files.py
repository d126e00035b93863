"""Nothing of the user's may be lost: devices, pipes, links, inputs, parts of a model, files that nobody named."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import ok, pixels, refused, tree
from PIL import Image

from hflow_rt.runtime.latents.files import load_latents

Command = Callable[..., Any]


def writers(output: str) -> dict[str, tuple[object, ...]]:
    """Every option that names a file or a folder to write, at a command that would write there."""
    return {
        "sample": ("sample", "-n", 1, "-o", output),
        "sample latents": ("sample", "-n", 1, "-o", "x.png", "--latents", output),
        "encode": ("encode", "a.png", "-o", output),
        "encode picture": ("encode", "a.png", "--picture", output),
        "decode": ("decode", "a.safetensors", "-o", output),
        "interpolate": ("interpolate", "-o", output),
        "walk": ("walk", "-o", output),
        "seeds": ("seeds", "-o", output),
        "heatmap": ("heatmap", "-o", output),
        "zeroing": ("zeroing", "-o", output),
        "temperature": ("temperature", "-o", output),
        "mix": ("mix", "-o", output),
        "neighbours": ("neighbours", "-o", output),
        "attribute": ("attribute", "make", "a", "b", "-o", output),
        "eval": ("eval", "bpd", "-o", output),
        "bench": ("bench", "-o", output),
        "dataset": ("dataset", "a", "-o", output, "--resolution", 16),
        "train": ("train", "--images", 16, "--out", output),
        "import": ("import", "a.pt", "-o", output),
        "export": ("export", "-o", output),
    }


KINDS = sorted(writers(""))


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_a_device_or_a_pipe(hflow: Command, run: Path, kind: str) -> None:
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    places = {"pipe": "a pipe", "link": "a pipe"}
    if os.geteuid() == 0:
        os.mknod("device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        places["device"] = "a device"
    before = {name: os.lstat(name) for name in places}
    for name, what in places.items():
        refused(hflow(*writers(name)[kind]), f"cannot write {name}: it is {what}")
        assert os.lstat(name).st_ino == before[name].st_ino
        assert os.lstat(name).st_mode == before[name].st_mode


@pytest.mark.parametrize("kind", KINDS)
def test_standard_output_is_no_place(hflow: Command, run: Path, kind: str) -> None:
    before = tree()
    refused(hflow(*writers("-")[kind]), "cannot write to standard output; name a file")
    assert tree() == before


def test_standard_output_as_a_path(run: Path) -> None:
    command = [sys.executable, "-m", "hflow_rt.cli", "sample", "-n", "1", "-o", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: cannot write /dev/stdout: it is a pipe, which a file would replace; name a file\n"


def test_links_stay_and_what_is_behind_them_is_written(hflow: Command, run: Path, photo: Command) -> None:
    photo("a.png")
    Path("real").mkdir()
    os.symlink("real/latents.safetensors", "latents.safetensors")  # a name that is free
    os.symlink("real", "folder")
    ok(hflow("encode", "a.png"))
    ok(hflow("encode", "a.png"))
    ok(hflow("sample", "-n", 1, "-o", "folder"))
    assert os.readlink("latents.safetensors") == "real/latents.safetensors"
    assert os.readlink("folder") == "real"
    assert tree("real") == {"latents.safetensors", "000000.png"}
    assert load_latents("real/latents.safetensors")[1]["images"] == ["a.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode", "me.png", "--picture", "me.png"),
        ("encode", "me.png", "--picture", "./sub/../me.png"),
        ("encode", "me.png", "--picture", "hard.png"),
        ("encode", "me.png", "--picture", "soft.png"),
        ("encode", "photos", "--picture", "photos/me.png"),
        ("interpolate", "me.png", "photos/me.png", "-o", "me.png"),
        ("temperature", "me.png", "-o", "me.png"),
        ("mix", "--row-images", "photos", "--column-images", "me.png", "-o", "photos/me.png"),
        ("neighbours", "--data", "photos", "-o", "photos/me.png"),
        ("eval", "bpd", "--data", "photos", "--by-step", "photos/me.png"),
    ],
)
def test_an_output_that_is_an_input(hflow: Command, run: Path, photo: Command, arguments: tuple[str, ...]) -> None:
    photo("me.png")
    photo("photos/me.png")
    Path("sub").mkdir()
    os.link("me.png", "hard.png")
    os.symlink("me.png", "soft.png")
    before = {path: path.read_bytes() for path in (Path("me.png"), Path("photos/me.png"))}
    refused(hflow(*arguments), "cannot write ", "choose another name")
    assert {path: path.read_bytes() for path in before} == before


def test_decoding_onto_the_latents(hflow: Command, run: Path) -> None:
    ok(hflow("sample", "-n", 1, "--latents", "mine.safetensors"))
    refused(hflow("encode", "samples.png", "-o", "mine.png"), "a latents file's name must end in .safetensors")
    os.symlink("mine.safetensors", "mine.png")
    refused(hflow("decode", "mine.safetensors", "-o", "mine.png"), "cannot write mine.png: it is an input")


def test_parts_of_a_model_are_no_output(hflow: Command, run: Path, photo: Command) -> None:
    photo("a.png")
    model = run / "model.safetensors"
    before = model.read_bytes()
    refused(hflow("encode", "a.png", "-o", model), f"cannot write {model}: that is a part of a model")
    manifest = run / "bundle" / "manifest.json"
    refused(hflow("eval", "bpd", "-o", manifest), f"cannot write {manifest}: that is a part of a model")
    refused(hflow("sample", "--trajectory", model), f"cannot write {model}: that is a part of a model")
    assert model.read_bytes() == before


def test_file_nobody_named_overwritten_by_default(hflow: Command, run: Path, photo: Command) -> None:
    """A picture called like a default output is somebody's, unless hflow-rt wrote it."""
    mine = photo("samples.png")
    before = mine.read_bytes()
    refused(hflow("sample", "-n", 1), "samples.png exists, was not written by hflow-rt", "-o")
    assert mine.read_bytes() == before
    ok(hflow("sample", "-n", 1, "-o", "samples.png"))
    ok(hflow("sample", "-n", 2))  # now it is ours
    ok(hflow("encode", "samples.png"))
    ok(hflow("encode", "samples.png"))
    for name in ("walk.webp", "interpolation.png"):
        Path(name).write_bytes(b"mine")
    refused(hflow("walk", "--frames", 2, "--keyframes", 2), "walk.webp exists, was not written by hflow-rt")
    refused(hflow("interpolate"), "interpolation.png exists, was not written by hflow-rt")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "b.webp", "b.gif"])
def test_our_pictures_are_known_as_ours(hflow: Command, run: Path, name: str) -> None:
    from hflow_rt.files import is_ours

    made = ("sample", "-n", 1, "-o") if name[0] == "a" else ("interpolate", "--frames", 3, "-o")
    ok(hflow(*made, name))
    assert is_ours(name)
    with Image.open(name) as image:
        image.load()
    assert pixels(name).shape[2] == 3


def test_file_nobody_named_overwritten_in_a_folder(hflow: Command, run: Path, photo: Command) -> None:
    mine = photo("many/000001.png")
    before = mine.read_bytes()
    refused(hflow("sample", "-n", 3, "-o", "many"), "many/000001.png exists, was not written by hflow-rt")
    assert mine.read_bytes() == before
    mine.unlink()
    ok(hflow("sample", "-n", 3, "-o", "many"))
    ok(hflow("sample", "-n", 3, "-o", "many", "--seed", 1))


def test_file_nobody_named_overwritten_by_a_report(hflow: Command, run: Path) -> None:
    Path("mine.md").write_text("my notes on hflow-rt")
    refused(hflow("bench", "-o", "mine", "--variant", "onnx"), "mine.md is there and no report of hflow-rt")
    assert Path("mine.md").read_text() == "my notes on hflow-rt"
    assert not Path("mine.json").exists()


def test_a_folder_with_somebody_elses_run_json(hflow: Command, run: Path) -> None:
    Path("mine").mkdir()
    Path("mine/run.json").write_text(json.dumps({"distance": "10 km"}))
    refused(hflow("train", "--images", 16, "--out", "mine"), "mine/run.json")
    assert json.loads(Path("mine/run.json").read_text()) == {"distance": "10 km"}
    assert tree("mine") == {"run.json"}


@pytest.mark.parametrize(
    "arguments", [("encode", "-"), ("decode", "-"), ("dataset", "-", "-o", "x.npy"), ("info", "-")]
)
def test_standard_input_is_not_read(hflow: Command, run: Path, arguments: tuple[str, ...]) -> None:
    more = ("--resolution", 16) if arguments[0] == "dataset" else ()
    refused(hflow(*arguments, *more), "standard input is not read; name a file")


def test_a_folder_that_is_more_than_a_bundle_is_not_replaced(hflow: Command, run: Path, photo: Command) -> None:
    """A web page has a manifest.json, too; and people put things beside an exported model."""
    Path("public").mkdir()
    Path("public/manifest.json").write_text('{"name": "app"}')
    refused(hflow("export", "-o", "public"), "public holds a manifest.json that is not of a bundle")
    Path("public/index.html").write_text("mine")
    refused(hflow("export", "-o", "public"), "public holds index.html, which is no part of a bundle")
    assert tree("public") == {"manifest.json", "index.html"}
    photo(f"{run}/bundle/mine.png")
    refused(hflow("export"), "bundle holds mine.png, which is no part of a bundle")


def test_a_report_is_no_part_of_a_model(hflow: Command, run: Path) -> None:
    for name in (run / "bundle" / "manifest", run / "run"):
        refused(hflow("bench", run, "-o", name, "--variant", "onnx"), "is a part of a model")


def test_a_checkpoint_is_no_output(hflow: Command, run: Path, photo: Command) -> None:
    photo("a.png")
    state = run / "checkpoints" / "000012800" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"weights")
    refused(hflow("encode", "a.png", "-o", state), "that is a part of a model")
    assert state.read_bytes() == b"weights"


def test_an_input_by_a_link_inside_a_folder(hflow: Command, run: Path, photo: Command) -> None:
    real = photo("elsewhere/a.png")
    before = real.read_bytes()
    Path("photos").mkdir()
    os.symlink(real.resolve(), "photos/a.png")
    for name in ("photos/a.png", "elsewhere/a.png"):
        refused(hflow("zeroing", "photos", "-o", name), "it lies in photos, which is read")
    assert real.read_bytes() == before


def test_a_demo_page_of_somebody_else(hflow: Command, run: Path) -> None:
    Path("demo").mkdir()
    Path("demo/index.html").write_text("my page")
    refused(hflow("demo", "--out", "."), "demo/index.html exists and was not written by hflow-rt")
    assert Path("demo/index.html").read_text() == "my page"
