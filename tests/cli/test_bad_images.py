"""Images and latents that cannot be used: one line, exit code 1, nothing half-written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import refused, tree

from hflow_rt.runtime.latents import load_latents, save_latents

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
