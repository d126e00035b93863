"""Images and latents that cannot be used: one line, exit code 1, nothing half-written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, refused, tree
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from hflow_rt.runtime.latents.files import load_latents, save_latents

Command = Callable[..., Any]


# images


@pytest.fixture(params=["dataset", "train", "encode", "export"])
def read_images(request: pytest.FixtureRequest, hflow: Command, run: Path) -> Command:
    """Each command that reads images, on a source: its result, and a check that it wrote nothing."""
    arguments = {
        "dataset": lambda source: ("dataset", source, "-o", "made.npy", "--resolution", 16),
        "train": lambda source: ("train", "--preset", "hflow-demo", "--data", source, "--out", "made"),
        "encode": lambda source: ("encode", source, "-o", "made.safetensors"),
        "export": lambda source: ("export", "--images", source, "-o", "made"),
    }[request.param]

    def call(source: object) -> Any:
        before = tree()
        result = hflow(*arguments(source))
        assert tree() == before
        return result

    return call


def test_an_empty_folder(read_images: Command) -> None:
    Path("empty").mkdir()
    refused(read_images("empty"), "empty holds no files; give a folder, zip or tar with images")


def test_a_folder_without_images(read_images: Command) -> None:
    Path("docs").mkdir()
    Path("docs/notes.txt").write_text("words")
    refused(read_images("docs"), "docs", "not an image")


def test_images_smaller_than_the_resolution(read_images: Command, photo: Command) -> None:
    photo("small/a.png", 15, 200)
    photo("small/b.png", 3, 3)
    refused(
        read_images("small"), "small is smaller than the resolution ", "(the largest is 15x200); give larger images"
    )


def test_a_broken_archive(read_images: Command) -> None:
    Path("photos.zip").write_bytes(b"PK\x03\x04 and then nothing")
    refused(read_images("photos.zip"), "photos.zip is not a whole zip file", "copy or download it again")


def test_a_source_that_is_not_there(read_images: Command) -> None:
    refused(read_images("nowhere"), "nowhere")


def test_a_source_that_would_never_end(read_images: Command) -> None:
    os.mkfifo("pipe")  # opening it waits until somebody writes
    refused(read_images("pipe"), "pipe")


def test_a_folder_that_may_not_be_read(read_images: Command) -> None:
    Path("photos").mkdir()
    Path("photos/secret").mkdir(0o000)
    if os.access("photos/secret", os.R_OK):
        pytest.skip("root may read everything")
    refused(read_images("photos"), "cannot read ", "photos/secret: Permission denied")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"words", "is not a whole image of a known kind"), (b"", "is not a whole image of a known kind")],
)
def test_a_file_that_is_no_image(hflow: Command, run: Path, content: bytes, reason: str) -> None:
    Path("a.png").write_bytes(content)
    refused(hflow("encode", "a.png"), "a.png", reason)
    refused(hflow("interpolate", "a.png", "a.png"), "a.png", reason)


def test_one_image_too_small(hflow: Command, run: Path, photo: Command) -> None:
    refused(
        hflow("encode", photo("a.png", 15, 40)),
        "a.png cannot be used: it is 15x40, smaller than 16; give a square image of at least 16x16",
    )


@pytest.fixture
def folder(photo: Command) -> Path:
    """encode_leaves_files_out: two images, an empty file and a page of HTML called like images, and a text."""
    photo("folder/a.png")
    photo("folder/b.png")
    Path("folder/empty.jpg").write_bytes(b"")
    Path("folder/page.jpg").write_text("<html>not found</html>")
    Path("folder/readme.txt").write_text("words")
    return Path("folder")


def test_encode_leaves_files_out(hflow: Command, run: Path, folder: Path) -> None:
    result = ok(hflow("encode", folder, "--json"))
    report = json.loads(result.out)
    assert report["images"] == ["a.png", "b.png"]
    assert report["skipped"] == {"empty.jpg": "empty file", "page.jpg": "not an image"}
    assert result.err == "2 images in folder; not used: 1 empty file, 1 not an image\n"
    assert load_latents("latents.safetensors")[1]["skipped"] == report["skipped"]
    shutil.copytree("folder", "other")
    report = json.loads(ok(hflow("encode", "folder", "other", "--json")).out)
    assert list(report["skipped"]) == ["folder/empty.jpg", "folder/page.jpg", "other/empty.jpg", "other/page.jpg"]


@pytest.mark.parametrize(
    "command",
    [
        ("interpolate", "folder", "-o", "made.png"),
        ("neighbours", "folder", "--data", "folder", "--split", "all", "-o", "made.png"),
        ("zeroing", "folder", "-o", "made.png"),
        ("eval", "bpd", "--data", "folder", "--split", "all", "--limit", 1),
        ("dataset", "folder", "-o", "made.npy", "--resolution", 16),
    ],
)
def test_every_command_counts_what_it_leaves_out(
    hflow: Command, run: Path, folder: Path, command: tuple[object, ...]
) -> None:
    result = ok(hflow(*command))
    if command[0] == "dataset":
        assert "skipped 1: empty file\nskipped 2: not an image\n" in result.out
    else:
        assert "1 empty file, 1 not an image" in result.out + result.err


def test_damaged_image_traceback(hflow: Command, run: Path, photo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Pillow raises for a damaged AVIF, at commands that take a single file and at one that takes a folder."""

    def load(image: Image.Image) -> None:
        raise RuntimeError("Failed to decode image: Missing or empty image item")

    photo("photos/a.png")
    monkeypatch.setattr(PngImageFile, "load", load)
    for command in (("encode",), ("interpolate", "photos/a.png"), ("check", "--images")):
        line = "photos/a.png is not a whole image of a known kind: "
        refused(hflow(*command, "photos/a.png"), line, "Missing or empty image item")
    refused(hflow("dataset", "photos", "-o", "x.npy", "--resolution", 16), "no usable image (1 broken image)")


def test_large_image_two_answers(hflow: Command, run: Path, photo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    photo("scans/a.png", 100, 100)
    photo("scans/b.png")
    for limit in (9000, 4000):  # Pillow warns above its limit and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        result = hflow("encode", "scans/a.png")
        refused(result, f"a.png cannot be used: it has more than {limit} pixels; reduce it first")
        assert "Warning" not in result.err
        result = ok(hflow("encode", "scans", "--json"))
        assert result.err == "1 images in scans; not used: 1 too large\n"
        assert "skipped 1: too large" in ok(hflow("dataset", "scans", "-o", "x.npy", "--resolution", 16)).out


def test_whole_pixels_broken_exif(hflow: Command, run: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHH", 2, 0x0112, 3, 1, 6, 0, 0x010F)
    Path("photos").mkdir()
    Image.new("RGB", (16, 16)).save("photos/a.jpg", exif=exif)
    for source in ("photos", "photos/a.jpg"):
        assert ok(hflow("encode", source, "--json")).err == ""
    assert json.loads(ok(hflow("dataset", "photos", "-o", "x.npy", "--resolution", 16, "--json")).out)["skipped"] == {}


def test_colour_profile_ignored(hflow: Command, run: Path) -> None:
    """To encode an image with a profile is to encode its colours in sRGB: half of the light is 188 there."""
    head = struct.pack(">I4xI12s12x4s28x3i", 156, 0x02400000, b"mntrGRAYXYZ ", b"acsp", 63190, 65536, 54061)
    linear = head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"kTRC", 144, 12) + b"curv" + bytes(8)
    Image.new("L", (16, 16), 128).save("linear.png", icc_profile=linear)
    Image.new("RGB", (16, 16), (188, 188, 188)).save("srgb.png")
    ok(hflow("encode", "linear.png", "srgb.png"))
    for latent in load_latents("latents.safetensors")[0].values():
        np.testing.assert_array_equal(latent[0], latent[1])


def test_own_arrays_are_images(hflow: Command, run: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), np.uint8)
    np.save("own.npy", levels)
    np.savez("own.npz", labels=np.arange(5), images=levels.transpose(0, 3, 1, 2))
    names = [f"image#{index:06}" for index in range(5)]
    made = [json.loads(ok(hflow("encode", source, "--json")).out) for source in ("own.npy", "own.npz")]
    assert made[0]["images"] == names
    assert made[0] == made[1]
    ok(hflow("neighbours", "own.npz", "--data", "own.npy", "--split", "all", "-k", 1, "-o", "x.png"))
    report = json.loads(ok(hflow("eval", "bpd", "--data", "own.npz", "--split", "all", "--limit", 1, "--json")).out)
    assert report["data_split"].endswith(" held out, by a hash of the names")
    ok(hflow("dataset", "own.npz", "-o", "set.npy", "--resolution", 16))
    assert json.loads(ok(hflow("encode", "set.npy", "--json")).out)["images"] == names
    np.save("floats.npy", levels / 255)
    refused(hflow("encode", "floats.npy"), "floats.npy holds float64 [5, 20, 24, 3]; images must be uint8")
    refused(hflow("train", "--data", "floats.npy"), "floats.npy holds float64 [5, 20, 24, 3]; images must be uint8")


def test_file_nobody_named_overwritten(hflow: Command, run: Path, photo: Command) -> None:
    photo("photos/a.png")
    Path("photos.json").write_text('{"a.png": "cat"}')
    before = tree()
    refused(hflow("dataset", "photos", "-o", "photos.npy", "--resolution", 16), "photos.json describes no dataset")
    assert tree() == before
    assert Path("photos.json").read_text() == '{"a.png": "cat"}'


def test_pipes_and_links_in_folders_are_counted(hflow: Command, run: Path, photo: Command) -> None:
    photo("photos/a.png")
    os.mkfifo("photos/pipe.png")
    Path("photos/again").symlink_to("../photos")
    Path("photos/gone.png").symlink_to("nowhere.png")
    result = ok(hflow("encode", "photos", "--json"))
    skipped = {"again": "link to a folder", "gone.png": "broken link", "pipe.png": "named pipe"}
    assert json.loads(result.out)["skipped"] == skipped
    assert result.err == "1 images in photos; not used: 1 broken link, 1 link to a folder, 1 named pipe\n"
    refused(hflow("encode", "photos/pipe.png"), "no image at photos/pipe.png: it is a named pipe")
    refused(hflow("encode", "photos/gone.png"), "no image at photos/gone.png: it is a link that leads to no file")


@pytest.mark.parametrize("count", [1, 3])
def test_interpolation_joins_two(hflow: Command, run: Path, photo: Command, count: int) -> None:
    names = [photo(f"folder/{index}.png") for index in range(count)]
    for images in (names, ["folder"]):
        refused(hflow("interpolate", *images), f"an interpolation joins two images, not {count}")


# latents


def test_latents_of_another_model(hflow: Command, run: Path) -> None:
    assert hflow("sample", "-n", 2, "--latents", "z.safetensors").code == 0
    values, about = load_latents("z.safetensors")
    save_latents("other.safetensors", values | {"z0": np.zeros((2, 3, 32, 32), np.float32)}, about)
    refused(
        hflow("decode", "other.safetensors"),
        "other.safetensors: latents do not fit the model: z0 is [3, 32, 32] there and [3, 16, 16] in the model",
        "use latents of this model",
    )
    save_latents("names.safetensors", {"w" + name: value for name, value in values.items()}, about)
    refused(hflow("decode", "names.safetensors"), "names.safetensors: ", "missing end0 [2, 1, 1]")
    save_latents("nan.safetensors", {name: np.nan * value for name, value in values.items()}, about)
    refused(hflow("decode", "nan.safetensors"), "end0 holds NaN")
    assert not Path("decoded.png").exists()


def test_a_file_that_holds_no_latents(hflow: Command, run: Path) -> None:
    refused(
        hflow("decode", run / "model.safetensors"),
        "holds tensors but no latents; give a file written by 'hflow-rt encode'",
    )
    refused(hflow("decode", "nowhere.safetensors"), "no latents file at nowhere.safetensors")
    hflow("sample", "-n", 2, "--latents", "z.safetensors")
    os.truncate("z.safetensors", 500)
    refused(hflow("decode", "z.safetensors"), "z.safetensors is not a whole latents file (", "encode or copy it again")
