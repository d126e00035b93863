"""The dataset file, the image set and its split, the demo images, and the command that builds a file."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from hflow_rt.assets import demo_images
from hflow_rt.cli.dataset import dataset
from hflow_rt.data.dataset import DatasetInfo, ImageSet, build_dataset, open_dataset
from hflow_rt.errors import ConfigError, DataError

R = 8


def save(path: Path, seed: int, size: tuple[int, int] = (R, R)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve usable images, one too small, one text file."""
    folder = tmp_path / "photos"
    for index in range(12):
        save(folder / f"{index:02}.png", index, (R + index, R + 2))
    save(folder / "small.png", 99, (R, R - 1))
    (folder / "notes.txt").write_text("not an image")
    return folder


def image_set(names: list[str]) -> ImageSet:
    return ImageSet(np.zeros((len(names), 3, 1, 1), np.uint8), names, {}, "")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "photos")


def test_build_writes_a_plain_npy_and_its_description(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "set.npy"
    seen: list[tuple[int, int]] = []
    info = build_dataset(photos, output, R, progress=lambda done, total: seen.append((done, total)))
    array = np.load(output)
    assert array.dtype == np.uint8
    assert array.shape == (12, 3, R, R)
    assert info.count == 12
    assert info.skipped == {"not an image": 1, "too small": 1}
    assert info.names == [f"{index:02}.png" for index in range(12)]
    assert DatasetInfo.model_validate_json(output.with_suffix(".json").read_text()) == info
    assert seen == [(done, 14) for done in range(1, 15)]
    assert leftovers(output.parent) == ["set.json", "set.npy"]
    with Image.open(photos / "00.png") as image:  # 8x10, so the crop is its rows 1 to 9
        np.testing.assert_array_equal(array[0], np.asarray(image)[1:9].transpose(2, 0, 1))


def test_a_file_opens_as_the_images_it_was_built_from(photos: Path, tmp_path: Path) -> None:
    build_dataset(photos, tmp_path / "set.npy", R)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(photos.iterdir(), reverse=True):
            archive.write(path, path.name)
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as archive_tar:
        for path in sorted(photos.iterdir()):
            archive_tar.add(path, path.name)
    sources = [photos, tmp_path / "set.npy", tmp_path / "photos.zip", tmp_path / "photos.tar.gz"]
    sets = [open_dataset(source, R) for source in sources]
    assert len({images.hash for images in sets}) == 1
    for images in sets:
        assert len(images) == 12
        assert images.resolution == R
        assert images.names == sets[0].names
        assert images.skipped == {"not an image": 1, "too small": 1}
        np.testing.assert_array_equal(images.pixels(range(12)), sets[0].pixels(range(12)))
        np.testing.assert_array_equal(images.split()[1], sets[0].split()[1])


def test_pixels_are_a_copy_in_the_order_asked_for(photos: Path, tmp_path: Path) -> None:
    build_dataset(photos, tmp_path / "set.npy", R)
    for source in (photos, tmp_path / "set.npy"):
        images = open_dataset(source, R)
        picked = images.pixels(np.array([3, 0, 3]))
        assert type(picked) is np.ndarray
        assert picked.shape == (3, 3, R, R)
        np.testing.assert_array_equal(picked[0], picked[2])
        picked[:] = 0
        assert images.pixels([3]).any()
        assert images.pixels([]).shape == (0, 3, R, R)


def test_large_sources_are_decoded_into_a_temporary_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = open_dataset(photos, R)
    monkeypatch.setattr("hflow_rt.data.dataset.MAX_MEMORY_BYTES", 5 * 3 * R * R)
    on_disk = open_dataset(photos, R)
    assert on_disk.hash == in_memory.hash
    np.testing.assert_array_equal(on_disk.pixels(range(12)), in_memory.pixels(range(12)))


def test_hash_follows_names_and_pixels(photos: Path) -> None:
    before = open_dataset(photos, R).hash
    assert open_dataset(photos, R).hash == before
    (photos / "00.png").rename(photos / "0.png")
    renamed = open_dataset(photos, R).hash
    save(photos / "0.png", 1000)
    assert len({before, renamed, open_dataset(photos, R).hash}) == 3


def test_hash_is_the_same_on_every_machine() -> None:
    images = ImageSet(np.zeros((1, 3, 1, 1), np.uint8), ["a.png"], {}, "00")
    # the hash of the text [["a.png"], "00"]
    assert images.hash == "cc1263935809189004c022d7ac61e4a1167090b16dd9c7a125d92c4e781c48e5"


def test_split_is_by_name_and_the_same_in_every_process() -> None:
    names = [f"image-{index}.png" for index in range(1000)]
    train, held = image_set(names).split()
    assert sorted([*train, *held]) == list(range(1000))
    assert 70 < len(held) < 130
    assert held[:5].tolist() == [1, 7, 21, 31, 46]
    held_names = {names[index] for index in held}
    more = [*names, *(f"new-{index}.png" for index in range(50))][::-1]
    assert {more[index] for index in image_set(more).split()[1]} & set(names) == held_names


@pytest.mark.parametrize("count", range(2, 12))
def test_small_sets_keep_both_sides(count: int) -> None:
    for salt in range(20):
        train, held = image_set([f"{salt}-{index}" for index in range(count)]).split()
        assert len(train) >= 1
        assert len(held) >= 1
        assert len(train) + len(held) == count


def test_a_single_image_is_trained_on() -> None:
    for name in ("a", "image-11.png", "test/a.png"):
        train, held = image_set([name]).split()
        assert (train.tolist(), held.tolist()) == ([0], [])


def test_train_and_test_folders_are_kept() -> None:
    train, held = image_set(["test/a", "train/a", "train/b/c", "val/a", "train/test"]).split()
    assert (train.tolist(), held.tolist()) == ([1, 2, 4], [0, 3])


@pytest.mark.parametrize(
    "names",
    [
        [*(f"train/{index}" for index in range(30))],  # nothing held out
        [*(f"test/{index}" for index in range(30))],  # nothing to train on
        [*(f"train/{index}" for index in range(29)), "test"],  # a file, not a folder
    ],
)
def test_other_folders_are_split_by_hash(names: list[str]) -> None:
    train, held = image_set(names).split()
    assert 1 <= len(held) <= 9
    assert len(train) >= 21


def test_strict_names_the_file(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"notes\.txt in .* not an image"):
        build_dataset(photos, tmp_path / "set.npy", R, strict=True)
    (photos / "notes.txt").unlink()
    with pytest.raises(DataError, match=r"small\.png in .* 8x7, smaller than 8"):
        build_dataset(photos, tmp_path / "set.npy", R, strict=True)
    (photos / "small.png").unlink()
    with pytest.raises(DataError, match=r"00\.png in .* 8x10 and cropping is off"):
        build_dataset(photos, tmp_path / "set.npy", R, crop="none", strict=True)
    assert leftovers(tmp_path) == []
    assert build_dataset(photos, tmp_path / "set.npy", R, strict=True).count == 12


def test_without_crop_only_squares_are_used(photos: Path, tmp_path: Path) -> None:
    info = build_dataset(photos, tmp_path / "set.npy", R, crop="none")
    assert info.names == ["02.png"]
    assert info.skipped == {"not an image": 1, "not square": 11, "too small": 1}
    assert info.crop == "none"


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataError, match="holds no files"):
        open_dataset(folder, R)
    save(folder / "a.png", 0, (6, 5))
    save(folder / "b.png", 0, (30, 3))
    with pytest.raises(DataError, match=r"smaller than the resolution 8 \(the largest is 6x5\); give larger"):
        open_dataset(folder, R)
    (folder / "c.png").write_text("no")
    with pytest.raises(DataError, match=r"no usable image \(2 too small, 1 not an image\)"):
        build_dataset(folder, tmp_path / "set.npy", R)
    with pytest.raises(DataError, match="does not exist"):
        build_dataset(tmp_path / "nowhere", tmp_path / "new" / "set.npy", R)
    assert leftovers(tmp_path) == ["folder"]


def test_a_failed_build_leaves_the_old_file(photos: Path, tmp_path: Path) -> None:
    build_dataset(photos, tmp_path / "set.npy", R)
    before = open_dataset(tmp_path / "set.npy", R).hash

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(photos, tmp_path / "set.npy", R + 1, progress=interrupt)
    assert leftovers(tmp_path) == ["set.json", "set.npy"]
    assert open_dataset(tmp_path / "set.npy", R).hash == before


def test_unwritable_output_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        build_dataset(photos, tmp_path / "file" / "set.npy", R)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        build_dataset(photos, tmp_path / "folder.npy", R)
    assert leftovers(tmp_path) == ["file", "folder.npy"]


@pytest.mark.parametrize("content", [b'{"cat": 1}', b"", b'{"format": 1}', None])
def test_file_nobody_named_overwritten(photos: Path, tmp_path: Path, content: bytes | None) -> None:
    labels = tmp_path / "photos.json"
    labels.write_bytes(content) if content is not None else labels.symlink_to("nowhere")
    with pytest.raises(DataError, match=r"photos\.json describes no dataset and would be replaced") as caught:
        build_dataset(photos, tmp_path / "photos.npy", R)
    assert "\n" not in str(caught.value)
    assert labels.read_bytes() == content if content is not None else labels.is_symlink()
    assert leftovers(tmp_path) == ["photos.json"]
    build_dataset(photos, tmp_path / "set.npy", R)
    build_dataset(photos, tmp_path / "set.npy", R)  # one of a dataset may be replaced


def test_a_dataset_never_replaces_its_source(photos: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.npy"
    np.save(own, np.zeros((4, R, R, 3), np.uint8))
    (tmp_path / "link.npy").symlink_to("own.npy")
    (tmp_path / "hard.npy").hardlink_to(own)
    for output in (own, tmp_path / "link.npy", tmp_path / "hard.npy", tmp_path / "photos" / ".." / "own.npy"):
        with pytest.raises(DataError, match="cannot be written over its own source"):
            build_dataset(own, output, R)
    build_dataset(own, tmp_path / "set.npy", R)
    with pytest.raises(DataError, match="cannot be written over its own source"):
        build_dataset(tmp_path / "set.npy", tmp_path / "set.npy", R // 2)
    (photos / "array.npy").write_bytes(own.read_bytes())
    with pytest.raises(DataError, match=r"array\.npy is a file of its source"):
        build_dataset(photos, photos / "array.npy", R)
    assert (photos / "array.npy").read_bytes() == own.read_bytes()
    assert build_dataset(photos, photos / "new.npy", R).count == 12
    assert build_dataset(photos, photos / "new.npy", R).count == 12  # a dataset, not a file of the source
    assert build_dataset(photos, own, R).count == 12  # it was named


def test_what_is_not_used_is_named(photos: Path, tmp_path: Path) -> None:
    """encode_leaves_files_out: what is called like an image counts as one, whatever is in it."""
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "page.jpg").write_text("<html>")
    (photos / "live.HEIC").write_bytes(b"no Pillow reads it")
    (photos / "empty").write_bytes(b"")
    os.mkfifo(photos / "pipe")
    build_dataset(photos, tmp_path / "set.npy", R)
    for source in (photos, tmp_path / "set.npy"):
        images = open_dataset(source, R)
        assert images.skipped == {"empty file": 2, "named pipe": 1, "not an image": 3, "too small": 1}
        assert images.unused == {
            "empty.jpg": "empty file",
            "live.HEIC": "not an image",
            "page.jpg": "not an image",
            "pipe": "named pipe",
            "small.png": "too small",
        }
        assert images.left_out == "1 empty file, 1 named pipe, 2 not an image, 1 too small"


def test_grey_sets_are_the_luminance_whatever_they_are_opened_from(photos: Path, tmp_path: Path) -> None:
    build_dataset(photos, tmp_path / "colour.npy", R)
    info = build_dataset(photos, tmp_path / "grey.npy", R, channels=1)
    assert info.channels == 1
    assert np.load(tmp_path / "grey.npy").shape == (12, 1, R, R)
    grey = open_dataset(tmp_path / "grey.npy", R, channels=1)
    colours = open_dataset(photos, R)
    for seen, pixels in zip(grey.pixels(range(12)), colours.pixels(range(12)), strict=True):
        np.testing.assert_array_equal(seen[0], np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L")))
    for source in (photos, tmp_path / "colour.npy"):
        assert open_dataset(source, R, channels=1).hash == grey.hash != colours.hash
    coloured = open_dataset(tmp_path / "grey.npy", R).pixels(range(12))
    np.testing.assert_array_equal(coloured, grey.pixels(range(12)).repeat(3, 1))


def test_grey_arrays_stay_what_they_are(tmp_path: Path) -> None:
    """Such as those of handwritten digits, one byte a pixel."""
    levels = np.random.default_rng(0).integers(0, 256, (5, R, R), dtype=np.uint8)
    np.save(tmp_path / "digits.npy", levels)
    np.testing.assert_array_equal(open_dataset(tmp_path / "digits.npy", R, channels=1).pixels(range(5))[:, 0], levels)


def test_a_description_without_what_is_not_used_is_read(photos: Path, tmp_path: Path) -> None:
    build_dataset(photos, tmp_path / "set.npy", R)
    info = json.loads((tmp_path / "set.json").read_text())
    del info["unused"]
    (tmp_path / "set.json").write_text(json.dumps(info))
    assert open_dataset(tmp_path / "set.npy", R).unused == {}


def test_impossible_settings_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end in \.npy"):
        build_dataset(photos, tmp_path / "set.bin", R)
    with pytest.raises(ConfigError, match="at least 1"):
        open_dataset(photos, 0)
    with pytest.raises(ConfigError, match="channels must be 3, or 1 for grey, not 2"):
        open_dataset(photos, R, channels=2)
    with pytest.raises(ConfigError, match="center, none"):
        open_dataset(photos, R, crop="left")  # type: ignore[arg-type]


class TestDamagedFile:
    @pytest.fixture
    def built(self, photos: Path, tmp_path: Path) -> Path:
        build_dataset(photos, tmp_path / "set.npy", R)
        return tmp_path / "set.npy"

    def edit_json(self, built: Path, **changes: object) -> None:
        path = built.with_suffix(".json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def refuse(self, built: Path, message: str, resolution: int = R) -> None:
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(built, resolution)
        assert "\n" not in str(caught.value)

    def test_truncated(self, built: Path) -> None:
        built.write_bytes(built.read_bytes()[:-1])
        self.refuse(built, "bytes where set.json asks for")

    @pytest.mark.parametrize("position", [0, 60, 128, -1])
    def test_changed_byte(self, built: Path, position: int) -> None:
        data = bytearray(built.read_bytes())
        data[position] ^= 1
        built.write_bytes(data)
        self.refuse(built, "sha256 differs")

    def test_missing_parts(self, built: Path) -> None:
        built.unlink()
        self.refuse(built, r"set\.npy is missing")
        built.with_suffix(".json").unlink()
        self.refuse(built, r"no images at .*set\.npy: it does not exist")

    def test_json_is_not_ours(self, built: Path) -> None:
        self.edit_json(built, format=2)
        self.refuse(built, "format")
        built.with_suffix(".json").write_text("{")
        self.refuse(built, "does not describe a dataset")

    def test_json_of_other_images(self, built: Path) -> None:
        self.edit_json(built, count=11)
        self.refuse(built, "asks for")
        self.edit_json(built, count=12, names=["a"])
        self.refuse(built, "with 1 names")

    def test_other_resolution(self, built: Path) -> None:
        self.refuse(built, "holds images of 8 pixels and 16 are needed", resolution=16)

    def test_array_of_another_layout(self, built: Path) -> None:
        data = built.read_bytes().replace(f"(12, 3, {R}, {R})".encode(), f"(3, 12, {R}, {R})".encode())
        built.write_bytes(data)
        self.edit_json(built, sha256=hashlib.sha256(data).hexdigest())
        self.refuse(built, r"uint8 \[3, 12, 8, 8\] where")


def test_demo_images_ship_whole_and_licensed(tmp_path: Path) -> None:
    path = demo_images()
    assert path.stat().st_size <= 2_600_000
    with zipfile.ZipFile(path) as archive:
        licence = archive.read("LICENSE.txt")
    assert b"Copyright (c) Microsoft Corporation." in licence
    assert licence == (path.parent / "EMOJI-LICENSE.txt").read_bytes()
    images = open_dataset(path, 64)
    train, held = images.split()
    assert (len(train), len(held)) == (600, 105)
    assert images.skipped == {"not an image": 1}
    corners = images.pixels(range(705))[:, :, 0, 0]
    assert (corners > 250).all(axis=1).mean() > 0.95  # composited on white


def run(*arguments: object) -> tuple[int, str, BaseException | None]:
    solo = typer.Typer(pretty_exceptions_enable=False)
    solo.command()(dataset)
    result = CliRunner().invoke(solo, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.exception


def test_command_prints_a_summary_and_the_next_command(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "set.npy"
    code, text, _ = run(photos, "-o", output, "--resolution", R)
    assert code == 0
    assert text.splitlines() == [
        f"12 images of 8x8 in {output} (0.0 MB)",
        "skipped 1: not an image",
        "skipped 1: too small",
        "split: 9 images to train on, 3 held out, by a hash of the names",
        f"next: hflow-rt train --data {output}",
    ]


def test_command_prints_json_alone(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "set.npy"
    code, text, _ = run(photos, "-o", output, "--resolution", R, "--crop", "none", "--json")
    assert code == 0
    summary = json.loads(text)
    assert summary["count"] == 1
    assert summary["crop"] == "none"
    assert summary["bytes"] == output.stat().st_size
    assert summary["skipped"] == {"not an image": 1, "not square": 11, "too small": 1}


def test_command_refuses(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "set.npy"
    assert isinstance(run(photos, "-o", output, "--resolution", R, "--strict")[2], DataError)
    assert run(photos, "-o", output, "--resolution", 0)[0] == 2
    assert run(photos, "-o", output, "--resolution", R, "--crop", "left")[0] == 2
    assert run(photos, "--resolution", R)[0] == 2
    assert not output.exists()


def test_command_module_is_light() -> None:
    code = "import sys, hflow_rt.cli.dataset; print([m for m in ('numpy', 'PIL', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
