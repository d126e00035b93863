"""Files appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from hflow_rt import files
from hflow_rt.errors import DataError
from hflow_rt.files import atomic_directory, atomic_file, sha256


def half_a_file(target: Path, error: type[BaseException]) -> None:
    with atomic_file(target) as temporary:
        temporary.write_text("half")
        raise error


def half_a_folder(target: Path, error: type[BaseException]) -> None:
    with atomic_directory(target) as temporary:
        (temporary / "half.txt").write_text("half")
        raise error


def test_a_file_appears_with_its_suffix_rights_and_parents(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "picture.png"
    with atomic_file(target) as temporary:
        assert temporary.suffix == ".png"  # writers choose a format by it
        assert temporary.name.startswith(".")
        assert temporary.parent == target.parent
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_failed_file_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error):
        half_a_file(target, error)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_a_failed_folder_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        half_a_folder(target, KeyboardInterrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert [path.name for path in target.iterdir()] == ["old.txt"]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for text in ("old", "new"):
        with atomic_directory(target) as temporary:
            assert temporary.name.startswith(".bundle.")
            (temporary / f"{text}.txt").write_text(text)
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_folder_that_cannot_take_its_place_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old.txt").write_text("old")
    replace = os.replace

    def second_fails(source: Path, goal: Path) -> None:
        if goal == target and source.parent == tmp_path:
            raise error
        replace(source, goal)

    monkeypatch.setattr(files.os, "replace", second_fails)
    expected = DataError if error is OSError else error
    with pytest.raises(expected), atomic_directory(target) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [path.name for path in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, writer: object) -> None:
    assert callable(writer)
    (tmp_path / "file").write_text("I am no folder")
    target = tmp_path / "file" / "inside"
    with (
        pytest.raises(DataError, match=f"cannot write {target}: .*; a folder on the way is a file") as caught,
        writer(target),
    ):
        raise AssertionError("must not get here")
    assert "\n" not in str(caught.value)


def test_an_oserror_inside_names_the_target(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"cannot write .*a\.txt: No space left on device"),
        atomic_file(tmp_path / "a.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_a_link_stays_and_what_is_behind_it_is_replaced(tmp_path: Path, writer: object) -> None:
    assert callable(writer)
    link = tmp_path / "link"
    for goal in ("there", "not/yet"):
        real = tmp_path / goal
        if goal == "there":
            real.mkdir() if writer is atomic_directory else real.write_text("old")
        link.unlink(missing_ok=True)
        link.symlink_to(real)
        with writer(link) as temporary:
            (temporary / "new.txt" if writer is atomic_directory else temporary).write_text("new")
        assert os.readlink(link) == str(real)
        assert (real / "new.txt" if writer is atomic_directory else real).read_text() == "new"
