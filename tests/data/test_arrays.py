"""Arrays of images that people bring along: which are understood, and what is said of the others."""

import io
import json
import os
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hflow_rt.data.arrays import open_array
from hflow_rt.data.dataset import build_dataset, open_dataset
from hflow_rt.data.resize import fit
from hflow_rt.errors import DataError

LEVELS = np.random.default_rng(0).integers(0, 256, (12, 8, 10, 3), np.uint8)  # [N, H, W, 3]
GREY = LEVELS[..., 0]


def refuse(path: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(path, 8)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (LEVELS, LEVELS),
        (np.ascontiguousarray(LEVELS.transpose(0, 3, 1, 2)), LEVELS),
        (GREY, GREY[..., None].repeat(3, 3)),
        (GREY[..., None], GREY[..., None].repeat(3, 3)),
        (GREY[:, None], GREY[..., None].repeat(3, 3)),
        (GREY[:1], GREY[:1, ..., None].repeat(3, 3)),
        (LEVELS[:3], LEVELS[:3]),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz", "NPY"])
def test_own_arrays(tmp_path: Path, array: NDArray[Any], expected: NDArray[Any], suffix: str) -> None:
    path = tmp_path / f"photos.{suffix}"
    with open(path, "wb") as file:
        np.savez_compressed(file, array) if suffix == "npz" else np.save(file, array)
    source = open_array(path)
    images = dict(source)
    assert len(source) == len(images) == len(array)
    assert [name for name, _ in source.part(range(len(array) // 2, len(array)))] == [*images][len(array) // 2 :]
    for index, (name, image) in enumerate(images.items()):
        assert name == f"image#{index:06}"
        assert isinstance(image, Image.Image)
        np.testing.assert_array_equal(image, expected[index])


def test_they_are_fitted_and_split_like_files(tmp_path: Path) -> None:
    np.save(tmp_path / "photos.npy", LEVELS)
    opened = open_dataset(tmp_path / "photos.npy", 4)
    np.testing.assert_array_equal(opened.pixels(range(12)), [fit(Image.fromarray(image), 4) for image in LEVELS])
    build_dataset(tmp_path / "photos.npy", tmp_path / "set.npy", 4)
    built = open_dataset(tmp_path / "set.npy", 4)
    assert built.hash == opened.hash
    np.testing.assert_array_equal(built.split()[1], opened.split()[1])
    assert json.loads((tmp_path / "set.json").read_text())["names"][0] == "image#000000"
    os.rename(tmp_path / "photos.npy", tmp_path / "renamed.npy")
    assert open_dataset(tmp_path / "renamed.npy", 4).hash == opened.hash  # so a run goes on with a file that moved
    np.save(tmp_path / "small.npy", LEVELS[:, :7])
    refuse(tmp_path / "small.npy", "smaller than the resolution 8 (the largest is 10x7)")
    with pytest.raises(DataError, match="no usable image"):
        build_dataset(tmp_path / "renamed.npy", tmp_path / "square.npy", 4, crop="none")


@pytest.mark.parametrize(
    ("array", "parts"),
    [
        (np.zeros((3, 3, 3, 3), np.uint8), ["uint8 [3, 3, 3, 3]", "colours may come first or last"]),
        (np.zeros((5, 3, 64, 3), np.uint8), ["uint8 [5, 3, 64, 3]", "give images of more than 3 pixels a side"]),
        (np.zeros((5, 1, 64, 3), np.uint8), ["colours may come first or last"]),
        (np.zeros((64, 64, 3), np.uint8), ["may be one image or grey ones; save array[None]"]),
        (np.zeros((3, 64, 64), np.uint8), ["may be one image or grey ones; save array[None]"]),
        (np.zeros((64, 64, 1), np.uint8), ["may be one image or grey ones; save array[None]"]),
        (np.zeros((5, 64, 64, 4), np.uint8), ["images must have 3 colours, or 1"]),
        (np.zeros((0, 64, 64, 3), np.uint8), ["which is no image"]),
        (np.zeros((5, 0, 64, 3), np.uint8), ["which is no image"]),
        (np.zeros((5, 3072), np.uint8), ["uint8 [5, 3072]; images must be uint8 from 0 to 255, as [N, H, W, 3] or"]),
        (np.zeros((2, 5, 8, 8, 3), np.uint8), ["images must be uint8"]),
        (np.zeros((), np.uint8), ["images must be uint8"]),
        (np.zeros((5, 8, 8, 3), np.float32), ["float32 [5, 8, 8, 3]; images must be uint8 from 0 to 255"]),
        (np.zeros((5, 8, 8, 3), np.int64), ["int64 [5, 8, 8, 3]; images must be uint8"]),
        (np.zeros((5, 8, 8), bool), ["bool [5, 8, 8]; images must be uint8"]),
        (np.zeros(5, [("a", np.uint8)]), ["images must be uint8"]),
        (np.array([LEVELS[0], None], object), ["object [2]; images must be uint8"]),
        (np.asfortranarray(LEVELS), ["in Fortran's order; save np.ascontiguousarray(array)"]),
    ],
)
def test_other_arrays_are_one_line(tmp_path: Path, array: NDArray[Any], parts: list[str]) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    refuse(tmp_path / "a.npy", *parts)
    np.savez(tmp_path / "a.npz", array, allow_pickle=True)
    refuse(tmp_path / "a.npz", *parts)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(["anything"], 0), (["y", "x"], 1), (["images", "labels"], 0), (["arr_0", "arr_1"], 0), (["Y", "X"], 1)],
)
def test_a_file_of_several_arrays(tmp_path: Path, names: list[str], chosen: int) -> None:
    arrays = {name: LEVELS if index == chosen else np.arange(12) for index, name in enumerate(names)}
    np.savez(tmp_path / "a.npz", **arrays)
    assert len(open_dataset(tmp_path / "a.npz", 8)) == 12


@pytest.mark.parametrize("names", [["x_train", "x_test"], ["images", "x"], []])
def test_which_array_is_meant_must_be_plain(tmp_path: Path, names: list[str]) -> None:
    np.savez(tmp_path / "a.npz", **dict.fromkeys(names, LEVELS))
    held = f"the arrays {', '.join(map(repr, names))}" if names else "no array"
    refuse(
        tmp_path / "a.npz", f"holds {held}, and one must be of images: save it alone, or only one of them as 'images'"
    )


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LEVELS)
    whole = (tmp_path / "a.npy").read_bytes()
    for data, part in (
        (b"", "is not a whole file of NumPy"),
        (b"words and words", "is not a whole file of NumPy"),
        (b"\x80\x04]\x94.", "is not a whole file of NumPy"),  # a pickle
        (whole[:40], "is not a whole file of NumPy"),
        (whole[:-1], "which needs 2880 bytes and not 2879"),
        (whole + b"x", "which needs 2880 bytes and not 2881"),
        (whole.replace(b"(12, 8, 10, 3)", b"(12,99999,9,3)"), "which needs 32399676 bytes and not 2880"),
    ):
        (tmp_path / "a.npy").write_bytes(data)
        refuse(tmp_path / "a.npy", part)
    (tmp_path / "a.npy").unlink()
    refuse(tmp_path / "a.npy", "it does not exist")
    os.mkfifo(tmp_path / "a.npy")
    refuse(tmp_path / "a.npy", "is no regular file")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and then nothing")
    refuse(tmp_path / "a.npz", "is not a whole file of NumPy")


def test_damage_inside_an_archive_is_found_where_it_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.concatenate([LEVELS] * 10))  # more than is read with the header
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.rindex(LEVELS[2].tobytes())] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    refuse(tmp_path / "a.npz", "is damaged at image 1", "(Bad CRC-32")
    assert sorted(os.listdir(tmp_path)) == ["a.npz"]


def test_too_large_images_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 79)
    np.save(tmp_path / "a.npy", LEVELS)
    refuse(tmp_path / "a.npy", "images of more than 79 pixels; reduce them first")


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(io.BytesIO):
        reads: list[tuple[int, int | None]] = []  # noqa: RUF012

        def read(self, size: int | None = -1, /) -> bytes:
            self.reads.append((self.tell(), size))
            return super().read(size)

    np.save(tmp_path / "a.npy", LEVELS)
    source = open_array(tmp_path / "a.npy")
    data = (tmp_path / "a.npy").read_bytes()
    monkeypatch.setattr("hflow_rt.data.arrays._stream", lambda path: nullcontext((Counted(data), len(data))))
    assert len(list(source.part(range(5, 7)))) == 2
    assert Counted.reads == [(128 + 5 * 240, 240), (128 + 6 * 240, 240)]


def test_a_description_beside_it_makes_it_a_dataset(tmp_path: Path) -> None:
    np.save(tmp_path / "photos.npy", LEVELS)
    (tmp_path / "photos.json").write_text('{"cat": 1}')
    with pytest.raises(DataError, match=r"photos\.json does not describe a dataset .* keep the two apart"):
        open_dataset(tmp_path / "photos.npy", 8)
    with pytest.raises(DataError, match=r"photos\.json does not describe a dataset"):
        build_dataset(tmp_path / "photos.npy", tmp_path / "set.npy", 8)
    (tmp_path / "photos.json").unlink()
    os.mkfifo(tmp_path / "photos.json")
    with pytest.raises(DataError, match=r"photos\.json must be a regular file"):
        open_dataset(tmp_path / "photos.npy", 8)
    assert sorted(os.listdir(tmp_path)) == ["photos.json", "photos.npy"]


def test_encrypted_archives_are_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", LEVELS)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.rindex(signature) + offset] |= 1
    (tmp_path / "a.npz").write_bytes(data)
    assert zipfile.is_zipfile(tmp_path / "a.npz")
    refuse(tmp_path / "a.npz", "encrypted")
