"""Every command that needs no training, as typed, on a tiny run."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from hflow_rt.assets import pretrained
from hflow_rt.cli import export as export_command
from hflow_rt.files import sha256
from hflow_rt.manifest import read_manifest
from hflow_rt.runtime import load
from hflow_rt.runtime.latents import load_latents
from hflow_rt.runtime.pictures import to_uint8

Command = Callable[..., Any]
COMMANDS = (
    "demo",
    "dataset",
    "train",
    "import",
    "export",
    "check",
    "sample",
    "encode",
    "decode",
    "interpolate",
    "info",
    "doctor",
)
R = 16


def ok(result: Any) -> Any:
    """The result of a command that must succeed."""
    assert result.code == 0, result.err
    return result


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(hflow: Command, command: str) -> None:
    text = ok(hflow(command, "--help")).out
    assert re.search(rf"Example: hflow-rt {command}\b", text)
    assert "[[" not in text


def test_help_lists_every_command(hflow: Command) -> None:
    text = ok(hflow("--help")).out
    places = [re.search(rf"^\W{{1,2}}{command}\b", text, re.MULTILINE) for command in COMMANDS]
    assert all(places)
    assert [place.start() for place in places if place] == sorted(place.start() for place in places if place)
    assert hflow("-h").out == text
    bare = hflow()
    assert "Usage: hflow-rt" in bare.out + bare.err


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(python: Command, arguments: list[str]) -> None:
    code = """
import sys
from hflow_rt.cli.__main__ import main
try:
    main()
finally:
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "PIL", "av", "accelerate", "tensorboard"} & sys.modules.keys()
    print("imported:", sorted(heavy), file=sys.stderr)
"""
    result = ok(python(code, *arguments))
    assert "Usage: hflow-rt" in result.out
    assert result.err == "imported: []\n"


# which model


def test_without_a_path_the_latest_run_is_used(hflow: Command, run: Path, tmp_path: Path) -> None:
    result = ok(hflow("sample", "-n", 1))
    assert f"from {run}/bundle on onnxruntime CPUExecutionProvider" in result.err
    assert Path("samples.png").is_file()
    assert f"{run}: hflow, " in ok(hflow("info")).out


@pytest.mark.parametrize(
    "arguments", [["sample", "-n", "1"], ["interpolate", "--frames", "2"], ["seeds", "3"], ["info"]]
)
def test_before_any_run_the_model_that_ships_is_used(
    hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = read_manifest(pretrained())
    result = ok(hflow(*arguments))
    assert result.err.startswith("no run under ./runs: this is hflow-emoji, the model that ships\n")
    assert arguments[0] == "info" or f"hflow 64x64 from {pretrained()} on onnxruntime" in result.err
    assert read_manifest(pretrained()) == before
    quiet = ok(hflow(*arguments, "--json"))
    assert quiet.err == ""


@pytest.mark.parametrize("command", [["export"], ["train", "--resume"]])
def test_before_any_run_one_line_says_how_to_get_one(
    hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = hflow(*command)
    assert result.code == 1
    assert result.out == ""
    expected = "error: no trained run under runs/; train one with 'hflow-rt train' or see it all with 'hflow-rt demo'\n"
    assert result.err == expected
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_not_exported(hflow: Command, run: Path) -> None:
    for path in (run / "bundle").iterdir():
        path.unlink()
    result = hflow("sample")
    assert result.code == 1
    assert result.err == f"error: {run} has no exported bundle; run 'hflow-rt export {run}' first\n"


def test_the_next_command_names_the_model_again(hflow: Command, run: Path, photo: Command) -> None:
    model = run / "bundle"
    assert f"hflow-rt interpolate --model {model} " in ok(hflow("sample", model, "-n", 1)).out
    assert "hflow-rt interpolate -o" in ok(hflow("sample", "-n", 1)).out
    encoded = ok(hflow("encode", photo("a.png"), "--model", model))
    assert f"next: hflow-rt decode latents.safetensors --model {model} -o decoded.png" in encoded.out


# export


@pytest.mark.slow
def test_export(hflow: Command, run: Path) -> None:
    before = read_manifest(run / "bundle")
    result = ok(hflow("export", "--engine", "onnx", "--direction", "inverse"))
    assert re.search(rf"{run}/bundle/inverse\.onnx: \d+ nodes, 0\.\d MB", result.out)
    assert re.search(r"inverse log_prob +\S+e-\d\d +\S+e-\d\d +\S+e-\d\d", result.out)
    assert "verified: the engines are the model\nnext: hflow-rt sample" in result.out
    assert "writing inverse.onnx" in result.err
    manifest = read_manifest(run / "bundle")
    assert manifest.verified
    assert list(manifest.graphs) == ["inverse"]
    assert manifest.checkpoint == before.checkpoint
    # the same graph, whoever wrote it and when
    assert manifest.graphs["inverse"] == before.graphs["inverse"]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_export_a_model_file_as_json(hflow: Command, run: Path, photo: Command) -> None:
    model = (run / "model.safetensors").rename("mine.safetensors")
    photo("proof/a.png", 20, 30)
    result = ok(hflow("export", model, "--direction", "inverse", "-o", "out/b", "--images", "proof", "--json"))
    report = json.loads(result.out)
    assert report["bundle"] == "out/b"
    assert report["graphs"] == ["inverse"]
    assert report["verified"] is True
    assert report["parity"]["passed"] is True
    assert result.err == ""
    assert read_manifest(Path("out/b")).checkpoint["sha256"] == sha256(model)


# sample


def test_sample_a_grid(hflow: Command, run: Path) -> None:
    result = ok(hflow("sample", run, "--backend", "onnx", "--std", "0.7", "-n", 4, "-o", "grid.png"))
    assert "4 images at std 0.7, seed 0: grid.png\nnext: hflow-rt " in result.out
    images = to_uint8(load(run).sample(4, 0.7))
    shown = pixels("grid.png")
    scale = (shown.shape[0] - 6) // (2 * R)
    assert shown.shape == (2 * R * scale + 6, 2 * R * scale + 6, 3)
    for index, image in enumerate(images):
        top, left = (2 + (R * scale + 2) * k for k in divmod(index, 2))
        cell = shown[top : top + R * scale : scale, left : left + R * scale : scale]
        np.testing.assert_array_equal(cell, image)


def test_sample_a_folder_in_batches(hflow: Command, run: Path) -> None:
    result = ok(hflow("sample", "-n", 5, "--batch", 2, "--seed", 3, "-o", "out"))
    assert "5 images at std 0.7, seed 3: out/" in result.out
    assert sorted(path.name for path in Path("out").iterdir()) == [f"{index:06d}.png" for index in range(5)]
    for index, image in enumerate(to_uint8(load(run).sample(5, 0.7, seed=3))):
        np.testing.assert_array_equal(pixels(f"out/{index:06d}.png"), image)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_sample_other_formats(hflow: Command, run: Path, suffix: str) -> None:
    ok(hflow("sample", "-n", 1, "-o", f"a{suffix}"))
    with Image.open(f"a{suffix}") as image:
        assert image.format == {".jpg": "JPEG", ".webp": "WEBP"}[suffix]


def test_sample_latents_and_decode_give_the_same_images(hflow: Command, run: Path) -> None:
    ok(hflow("sample", "-n", 3, "--std", "0.9", "--latents", "z.safetensors", "-o", "a"))
    values, about = load_latents("z.safetensors")
    assert list(values) == ["end0", "end1", "z1", "z0"]
    assert all(len(value) == 3 for value in values.values())
    weights = read_manifest(run / "bundle").checkpoint["sha256"]
    assert about == {"family": "hflow", "model": weights, "seed": 0, "std": ["0.9"]}
    assert "3 images: b/" in ok(hflow("decode", "z.safetensors", "-o", "b")).out
    for index in range(3):
        np.testing.assert_array_equal(pixels(f"a/{index:06d}.png"), pixels(f"b/{index:06d}.png"))


def test_sample_one_image_of_a_seed(hflow: Command, run: Path) -> None:
    assert hflow("sample", "-n", 4, "--seed", 5, "-o", "all").code == 0
    assert hflow("sample", "-n", 1, "--seed", 5, "--first", 2, "-o", "one").code == 0
    assert [path.name for path in Path("one").iterdir()] == ["000002.png"]
    difference = np.abs(pixels("all/000002.png").astype(int) - pixels("one/000002.png").astype(int))
    assert difference.max() <= 1  # another batch may round a pixel the other way
    refused = hflow("sample", "-n", 1, "--first", -1)
    assert refused.code == 1
    assert "Traceback" not in refused.err


def test_sample_json(hflow: Command, run: Path) -> None:
    result = ok(hflow("sample", "-n", 2, "--json", "--seed", 7))
    assert json.loads(result.out) == {
        "images": 2,
        "output": "samples.png",
        "seed": 7,
        "std": ["0.7"],
        "backend": "onnxruntime CPUExecutionProvider",
        "bundle": str(run / "bundle"),
    }
    assert result.err == ""


def test_sample_std_by_level(hflow: Command, run: Path) -> None:
    def drawn(*stds: str) -> dict[str, np.ndarray]:
        options = [word for std in stds for word in ("--std", std)]
        ok(hflow("sample", "-n", 1, *options, "--latents", "z.safetensors"))
        return load_latents("z.safetensors")[0]

    whole = drawn("1")
    for stds, factors in {
        ("0.5",): (0.5, 0.5, 0.5, 0.5),
        ("z0=0.25",): (1, 1, 1, 0.25),
        ("0.5", "z0=0.25", "end0=2"): (2, 0.5, 0.5, 0.25),
    }.items():
        for (name, value), factor in zip(drawn(*stds).items(), factors, strict=True):
            np.testing.assert_allclose(value, factor * whole[name], rtol=1e-6, err_msg=f"{stds} {name}")


def test_backends_draw_the_same_picture(hflow: Command, run: Path) -> None:
    for backend in ("onnx", "torch"):
        result = ok(hflow("sample", "-n", 4, "-b", backend, "--device", "cpu", "-o", f"{backend}.png"))
        assert f" on {'onnxruntime CPU' if backend == 'onnx' else 'torch cpu'}" in result.err
    # a value exactly between two levels may round either way
    assert np.abs(pixels("onnx.png").astype(int) - pixels("torch.png")).max() <= 1


def test_sampling_with_onnx_imports_no_torch(python: Command, run: Path) -> None:
    code = """
import sys
from hflow_rt.cli.__main__ import main
try:
    main()
finally:
    print("imported:", sorted({"torch", "onnx", "triton", "av", "accelerate"} & sys.modules.keys()))
"""
    result = ok(python(code, "sample", "--backend", "onnx", "--std", "0.7", "-n", 2, "--latents", "z.safetensors"))
    assert "2 images" in result.out
    assert result.out.endswith("imported: []\n")


# encode, decode


def test_encode_decode_gives_the_images_back(hflow: Command, run: Path, photo: Command) -> None:
    paths = [photo(f"photos/{name}.png") for name in "abc"]
    result = ok(hflow("encode", *paths, "-o", "z.safetensors", "--picture", "rows.png"))
    assert re.search(r"^a\.png: \d+\.\d{3} bits/dim \(plug-in estimate\)$", result.out, re.MULTILINE)
    assert "latents of 3 images: z.safetensors; reconstruction: rows.png\nnext: hflow-rt decode" in result.out
    assert pixels("rows.png").shape[0] > 2 * R
    ok(hflow("decode", "z.safetensors", "-o", "back"))
    for index, path in enumerate(paths):
        np.testing.assert_array_equal(pixels(f"back/{index:06d}.png"), pixels(path))


def test_encode_json_and_what_the_file_knows(hflow: Command, run: Path, photo: Command) -> None:
    photo("photos/b.png", 20, 40)
    photo("photos/deep/a.png")
    photo("photos/small.png", 15, 40)
    Path("photos/notes.txt").write_text("not an image")
    result = ok(hflow("encode", "photos", "--json"))
    report = json.loads(result.out)
    assert report["output"] == "latents.safetensors"
    assert report["images"] == ["b.png", "deep/a.png"]
    assert result.err == "2 images in photos; not used: 1 too small\n"
    _, about = load_latents("latents.safetensors")
    assert about["images"] == report["images"]
    bits = -np.array(about["log_prob"]) / (3 * R * R * np.log(2)) + 8
    np.testing.assert_allclose(report["bits_per_dim"], bits, rtol=1e-6)


@pytest.mark.parametrize("name", ["photos.zip", "photos.ZIP", "photos.tar.gz", "photos.tgz"])
def test_encode_an_archive(hflow: Command, run: Path, photo: Command, name: str) -> None:
    import shutil

    photo("photos/a.png")
    kind = "zip" if name.lower().endswith("zip") else "gztar"
    Path(shutil.make_archive("made", kind, "photos")).rename(name)
    assert json.loads(ok(hflow("encode", name, "--json")).out)["images"] == ["a.png"]


def test_decode_latents_of_another_training_state(hflow: Command, run: Path) -> None:
    from hflow_rt.runtime.latents import save_latents

    ok(hflow("sample", "-n", 1, "--latents", "z.safetensors"))
    values, about = load_latents("z.safetensors")
    save_latents("z.safetensors", values, about | {"model": "0" * 64})
    result = ok(hflow("decode", "z.safetensors", "--json"))
    assert json.loads(result.out) == {"images": 1, "output": "decoded.png"}
    assert "warning: z.safetensors was made by another training state" in result.err


# interpolate


@pytest.mark.parametrize(
    ("suffix", "space", "mode", "format_"),
    [
        (".png", "z", "slerp", "PNG"),
        (".gif", "z", "lerp", "GIF"),
        (".webp", "y0", "lerp", "WEBP"),
        (".gif", "y0", "slerp", "GIF"),
    ],
)
def test_interpolate_between_samples(
    hflow: Command, run: Path, suffix: str, space: str, mode: str, format_: str
) -> None:
    result = ok(
        hflow("interpolate", "-o", f"walk{suffix}", "--space", space, "--mode", mode, "--frames", 5, "--seed", 2)
    )
    count = 5 if suffix == ".png" else 8  # there and back without showing an end twice
    assert f"{count} frames ({mode} in {space}): walk{suffix}\nnext: hflow-rt interpolate A.png B.png" in result.out
    with Image.open(f"walk{suffix}") as image:
        assert image.format == format_
        assert getattr(image, "n_frames", 1) == (1 if suffix == ".png" else 8)


def test_interpolate_writes_mp4(hflow: Command, run: Path) -> None:
    av = pytest.importorskip("av", reason="mp4 needs the extra 'video'")
    report = json.loads(ok(hflow("interpolate", "-o", "walk.mp4", "--frames", 4, "--no-loop", "--json")).out)
    assert report == {"output": "walk.mp4", "frames": 4, "mode": "lerp", "space": "z"}
    with av.open("walk.mp4") as video:
        assert len(list(video.decode(video=0))) == 4


@pytest.mark.parametrize("space", ["z", "y0"])
def test_interpolate_between_images_starts_and_ends_on_them(
    hflow: Command, run: Path, photo: Command, space: str
) -> None:
    a, b = photo("a.png"), photo("b.png")
    ok(hflow("interpolate", a, b, "--space", space, "--frames", 3, "-o", "walk.png"))
    shown = pixels("walk.png")
    scale = (shown.shape[0] - 4) // R
    frames = [
        shown[2:-2:scale, left : left + R * scale : scale] for left in (2 + k * (R * scale + 2) for k in range(3))
    ]
    np.testing.assert_array_equal(frames[0], pixels(a))
    np.testing.assert_array_equal(frames[2], pixels(b))
    assert (frames[1] != frames[0]).any()
    assert (frames[1] != frames[2]).any()


def test_interpolate_takes_a_folder_of_two(hflow: Command, run: Path, photo: Command) -> None:
    photo("two/a.png")
    photo("two/b.png")
    ok(hflow("interpolate", "two", "-o", "folder.png"))
    ok(hflow("interpolate", "two/a.png", "two/b.png", "-o", "files.png"))
    np.testing.assert_array_equal(pixels("folder.png"), pixels("files.png"))


# check


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_check_passes(hflow: Command, run: Path, backend: str) -> None:
    result = ok(hflow("check", "--backend", backend, "--device", "cpu"))
    assert f"{run}/bundle on {'onnxruntime CPU' if backend == 'onnx' else 'torch cpu'}" in result.out
    for line in ("forward image", "inverse log_prob", "inverse bits/dim", "image -> latents -> image, batch 3"):
        assert line in result.out
    assert "verified: the engines are the model\nnext: hflow-rt sample\n" in result.out


def test_check_says_no_after_tampering_and_yes_after_repair(hflow: Command, run: Path, photo: Command) -> None:
    photo("a.png")
    engine, manifest = run / "bundle" / "forward.onnx", run / "bundle" / "manifest.json"
    whole = engine.read_bytes(), manifest.read_text()
    graph = onnx.load(engine)
    weight = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] == 8)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[np.abs(values).argmax()] *= 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, engine)
    described = json.loads(manifest.read_text())  # whoever exchanges an engine can also mend its hash
    described["files"]["forward.onnx"] = {"sha256": sha256(engine), "bytes": engine.stat().st_size}
    manifest.write_text(json.dumps(described))

    result = hflow("check", "--images", "a.png")
    assert result.code == 1
    assert "NOT VERIFIED" in result.out
    assert result.err.splitlines()[-1].startswith(
        "error: the engines differ from the reference, the bundle is marked unverified: "
    )
    assert "forward.image at batch 1" in result.err
    assert not read_manifest(run / "bundle").verified
    assert "UNVERIFIED" in hflow("info").out
    sampled = ok(hflow("sample", "-n", 1, "--json"))
    assert (
        f"warning: this bundle is unverified (parity failed or never ran); see 'hflow-rt check {run}/bundle'"
        in sampled.err
    )

    engine.write_bytes(whole[0])
    described["files"] = json.loads(whole[1])["files"]
    manifest.write_text(json.dumps(described | {"verified": False}))
    report = json.loads(ok(hflow("check", "--json")).out)
    assert report["passed"] is True
    assert report["failures"] == []
    assert read_manifest(run / "bundle").verified


# info, doctor


def test_info_of_a_run(hflow: Command, run: Path) -> None:
    text = ok(hflow("info", run)).out
    assert re.search(rf"^{run}: hflow, [\d,]+ values$", text, re.MULTILINE)
    assert f"bundle: {run}/bundle, verified, fp32, opset 20" in text
    assert "latent end1: 6x1x1, prior std 1.0" in text
    manifest = read_manifest(run / "bundle")
    for name, graph in manifest.graphs.items():
        assert re.search(rf"  {name}: {sum(graph.operators.values())} nodes, \d+\.\d MB, batch 1\.\.64", text)
        assert ", ".join(f"{count} {operator}" for operator, count in graph.operators.items()) in text


@pytest.mark.parametrize("what", ["", "bundle", "model.safetensors"])
def test_info_as_json(hflow: Command, run: Path, what: str) -> None:
    found = json.loads(ok(hflow("info", run / what, "--json")).out)
    assert found["path"] == str(run / what)
    assert found["model"]["family"] == "hflow"
    assert found["model"]["config"]["levels"][0]["resolution"] == R
    assert found["model"]["values"] > 10_000
    assert ("bundle" in found) == (what != "model.safetensors")
    if "bundle" in found:
        assert found["bundle"]["verified"] is True
        assert found["bundle"]["graphs"]["forward"]["operators"]["Conv"] > 10


def test_info_of_a_model_file_says_to_export_it(hflow: Command, run: Path) -> None:
    assert f"next: hflow-rt export {run}/model.safetensors" in ok(hflow("info", run / "model.safetensors")).out


def test_doctor(hflow: Command) -> None:
    text = ok(hflow("doctor")).out
    assert re.search(r"onnx backend: onnxruntime [\d.]+, compiled with .*CPUExecutionProvider", text)
    assert re.search(r"torch backend: torch \d", text)
    assert "training and export: ok" in text
    found = json.loads(ok(hflow("doctor", "--json")).out)
    assert found["training and export"] == "ok"


def test_doctor_names_what_is_missing(hflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def version(package: str) -> str:
        if package == "onnxruntime":
            return "1.2.3"
        if package == "onnxruntime-gpu":
            return "1.2.3"
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    text = ok(hflow("doctor")).out
    assert "onnx backend: BROKEN: onnxruntime and onnxruntime-gpu overwrite each other" in text
    assert "torch backend: missing: pip install 'hflow-rt[train]'" in text
    assert "training and export: missing torch, onnx, onnxscript, accelerate, tensorboard: pip install" in text
    assert "mp4 video: missing av: pip install 'hflow-rt[video]'" in text


def test_doctor_survives_what_is_broken(hflow: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    text = ok(hflow("doctor")).out
    assert re.search(r"onnx backend: BROKEN: .*; pip install --force-reinstall --no-deps onnxruntime\n", text)
    assert re.search(r"torch backend: BROKEN: .*; pip install --force-reinstall torch\n", text)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    assert "onnx backend: BROKEN: its files were removed with another package" in ok(hflow("doctor")).out


def test_the_engines_on_offer_are_those_that_exist(hflow: Command) -> None:
    text = " ".join(hflow("export", "--help").out.split())
    assert all(engine in text for engine in export_command._ENGINES)
