"""Options as one-hot vectors: by folder, in turn, or one for all."""

from pathlib import Path

import numpy as np
import pytest

from hflow_rt.conditions import by_folder, check_conditions, class_folder, in_turn, of_option
from hflow_rt.errors import DataError

CHOICES = {"labels": ("boot", "coat", "train")}


def test_by_folder() -> None:
    """The folder nearest to the image decides, at any depth; a file's own name does not."""
    names = ["coat/1.png", "train/boot/x.png", "a/train/b/coat", "train/coat/boot"]
    assert by_folder(CHOICES, names)["labels"].argmax(1).tolist() == [1, 0, 2, 1]
    assert by_folder({}, names) == {}
    for name in ("coat", "coats/1.png", "1.png"):
        with pytest.raises(DataError, match=f"named after one of the labels .*'{name}' is in none"):
            by_folder(CHOICES, ["boot/1.png", name])


def test_a_folder_or_file_tells_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot" / "left").mkdir(parents=True)
    (tmp_path / "boot" / "1.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "boot")
    for path in (tmp_path / "boot", tmp_path / "boot" / "1.png", Path("."), Path("1.png"), Path("left/..")):
        assert class_folder(CHOICES, path) == "boot/"
        assert class_folder({}, path) == ""
    Path("coat").symlink_to(tmp_path / "boot" / "left")
    assert class_folder(CHOICES, Path("coat")) == class_folder(CHOICES, Path("coat/x.png")) == "coat/"
    for path in (tmp_path, Path("left")):
        assert class_folder(CHOICES, path) == ""


def test_told_must_be_one_hot_or_a_mixture() -> None:
    fine = np.array([[1, 0, 0], [0.25, 0.5, 0.25]], np.float32)
    check_conditions(CHOICES, {"labels": fine})
    check_conditions({}, {})
    for wrong in ([2.0, -1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [np.nan, 0.0, 1.0], [np.inf, 0.0, 0.0]):
        rows = np.concatenate([fine, np.array([wrong], np.float32)])
        with pytest.raises(DataError, match="labels must be one-hot, or a mixture"):
            check_conditions(CHOICES, {"labels": rows})


def test_in_turn() -> None:
    rows = in_turn(CHOICES, [0, 4, 2])["labels"]
    assert rows.dtype == np.float32
    assert np.array_equal(rows, [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert in_turn({}, [0, 1]) == {}


def test_of_option() -> None:
    assert np.array_equal(of_option(CHOICES, "coat", 2)["labels"], [[0, 1, 0], [0, 1, 0]])
    with pytest.raises(DataError, match="unknown option 'hat' of labels; known: boot, coat, train"):
        of_option(CHOICES, "hat", 1)
    with pytest.raises(DataError, match="knows no classes; omit 'coat'"):
        of_option({}, "coat", 1)
