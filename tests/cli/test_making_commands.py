"""Commands that make images and latents, as typed, on a tiny run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, pixels
from PIL import Image

from hflow_rt.manifest import read_manifest
from hflow_rt.runtime import load
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.files import load_latents

Command = Callable[..., Any]
R = 16


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
    from hflow_rt.runtime.latents.files import save_latents

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
