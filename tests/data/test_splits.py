"""What is held out: by folders wherever they lie in a source, else by a hash of the names."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_rt.data.dataset import build_dataset, open_dataset
from hflow_rt.data.selection import select
from hflow_rt.data.splits import split_names

TRAIN = [f"train/{index:02}.png" for index in range(30)]
TEST = [f"test/{index:02}.png" for index in range(10)]


def held_out(names: list[str]) -> list[str]:
    return [names[index] for index in split_names(names).held_out]


@pytest.mark.parametrize(
    ("wrap", "others"),
    [
        ("{}", []),
        ("photos/{}", []),  # a folder around everything, as archives usually have
        ("a/b/{}", []),
        ("test/{}", []),  # also if it is called like a side
        ("train/{}", ["cover.png"]),
        ("{}", ["cover.png"]),  # beside the folders
        ("photos/{}", ["cover.png", "photos/cover.png"]),
        ("photos/{}", ["extras/1.png", "extras/cats/2.png"]),
    ],
)
def test_split_folders_ignored(wrap: str, others: list[str]) -> None:
    train, test = ([wrap.format(name) for name in names] for names in (TRAIN, TEST))
    names = sorted([*train, *test, *others])
    split = split_names(names)
    assert held_out(names) == test
    assert [names[index] for index in split.training] == sorted([*train, *others])
    folders = wrap.format("train/"), wrap.format("test/")
    assert str(split) == f"{30 + len(others)} images to train on, 10 held out, by the folders {' and '.join(folders)}"


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "training_set", "train2017", "train-images"])
@pytest.mark.parametrize(
    "test", ["test", "Testing", "val", "VAL2017", "valid", "Validation", "eval", "dev", "test set"]
)
def test_what_the_folders_may_be_called(train: str, test: str) -> None:
    assert held_out([f"{train}/cats/1", f"{train}/dogs/2", f"{test}/cats/1"]) == [f"{test}/cats/1"]


def test_the_outermost_folder_decides_also_below_classes() -> None:
    names = ["cats/train/1", "cats/train/test/2", "cats/test/3", "dogs/test/train/4", "dogs/train/5", "dogs/6"]
    assert held_out(names) == ["cats/test/3", "dogs/test/train/4"]
    by = split_names(names).by
    assert by == "the folders cats/train/, dogs/train/ and cats/test/, dogs/test/"


@pytest.mark.parametrize(
    ("names", "by"),
    [
        (TRAIN, "a hash of the names"),
        (TEST, "a hash of the names"),
        (["train/cats/1", "train/dogs/2", "other/3"], "a hash of the names"),
        (["bus/1", "tests/2", "trainers/3", "validated/4", "contest/5"], "a hash of the names"),
        (["train/1", "train/2", "test"], "a hash of the names"),  # a file called test
        (
            ["cats/1", "dogs/2", "photos/test/3", "val/4"],
            "a hash of the names, because photos/test/, val/ has no train/ beside it",
        ),
    ],
)
def test_without_two_sides_a_hash_decides_and_says_why(names: list[str], by: str) -> None:
    split = split_names(names)
    assert split.by == by
    assert len(split.training) >= 1
    assert len(split.held_out) >= 1
    assert len(split.training) + len(split.held_out) == len(names)


def save(path: Path, index: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(path)


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_split_folders_ignored_in_no_kind_of_source(tmp_path: Path, separator: str) -> None:
    names = [f"photos/Train/{index}.png" for index in range(6)] + ["photos/valid/1.png", "cover.png"]
    for index, name in enumerate(names):
        save(tmp_path / "folder" / name, index)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:  # of Windows, with entries for folders and leftovers
        archive.writestr("photos" + separator, b"")
        archive.writestr(separator.join(["__MACOSX", "test", "1.png"]), b"x")
        archive.writestr(separator.join(["photos", "test", "._1.png"]), b"x")
        for name in names:
            archive.write(tmp_path / "folder" / name, name.replace("/", separator))
    build_dataset(tmp_path / "images.zip", tmp_path / "set.npy", 4)
    build_dataset(tmp_path / "set.npy", tmp_path / "small.npy", 2)  # of a dataset: it keeps its names
    opened = [open_dataset(tmp_path / source, 4) for source in ("folder", "images.zip", "set.npy")]
    assert len({images.hash for images in opened}) == 1
    for images in [*opened, open_dataset(tmp_path / "small.npy", 2)]:
        assert images.skipped == {}
        assert [images.names[index] for index in images.split()[1]] == ["photos/valid/1.png"]
        assert images.split_by == "7 images to train on, 1 held out, by the folders photos/Train/ and photos/valid/"
    assert select(tmp_path / "images.zip", 4).names == ["photos/valid/1.png"]


def test_names_with_backslashes_in_a_folder(tmp_path: Path) -> None:
    """What some programs leave when they unpack an archive of Windows elsewhere."""
    for index, name in enumerate(["train\\1.png", "train\\2.png", "train0.png", "test\\1.png"]):
        save(tmp_path / name, index)
    images = open_dataset(tmp_path, 4)
    assert images.names == ["test/1.png", "train/1.png", "train/2.png", "train0.png"]
    assert images.split()[1].tolist() == [0]


def test_training_and_evaluation_hold_out_the_same(tmp_path: Path) -> None:
    """split_folders_ignored: on a folder, and on a dataset made of it."""
    for index, name in enumerate(["p/train/1.png", "p/train/2.png", "p/test/3.png", "p/cover.png"]):
        save(tmp_path / "photos" / name, index)
    build_dataset(tmp_path / "photos", tmp_path / "set.npy", 4)
    for source in ("photos", "set.npy"):
        opened = open_dataset(tmp_path / source, 4)
        assert [opened.names[index] for index in opened.split()[1]] == ["p/test/3.png"]
        assert select(tmp_path / source, 4).names == ["p/test/3.png"]
