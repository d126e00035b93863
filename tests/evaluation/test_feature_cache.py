"""The cache of data features: what is a hit, what is a miss, and that it is never an error."""

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_networks import Counting, selection

from hflow_rt.errors import ConfigError
from hflow_rt.evaluation.cache import FeatureCache, cache_folder, cache_key
from hflow_rt.evaluation.distance import data_statistics
from hflow_rt.evaluation.statistics import Statistics

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 3, 8, 8), dtype=np.uint8)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, said: list[str]) -> FeatureCache:
    return FeatureCache(tmp_path / "features", said.append)


def same(a: Statistics | None, b: Statistics | None) -> bool:
    assert a is not None
    assert b is not None
    return a.n == b.n and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("mean", "covariance", "rows")
    )


def test_a_hit_does_no_work_and_is_the_same(cache: FeatureCache, said: list[str]) -> None:
    first, second = Counting(), Counting()
    made = data_statistics(first.network, selection(PIXELS), 4, cache)
    found = data_statistics(second.network, selection(PIXELS), 2, cache)
    assert (first.seen, second.seen) == (9, 0)
    assert same(made, found)
    assert said == []
    assert len(list(cache.folder.iterdir())) == 1
    third = Counting()
    data_statistics(third.network, selection(PIXELS), 4, None)
    assert third.seen == 9


@pytest.mark.parametrize(
    ("network", "data"),
    [
        (Counting("other"), selection(PIXELS)),
        (Counting(), selection(PIXELS, digest="other")),
        (Counting(), selection(PIXELS, split="test")),
        (Counting(), selection(PIXELS[:, :, ::2, ::2])),
        (Counting(), replace(selection(PIXELS), indices=np.arange(5))),
    ],
    ids=["network", "images", "split", "resolution", "count"],
)
def test_a_miss_whenever_anything_differs(cache: FeatureCache, network: Counting, data: Any) -> None:
    data_statistics(Counting().network, selection(PIXELS), 4, cache)
    data_statistics(network.network, data, 4, cache)
    assert network.seen == len(data)
    assert len(list(cache.folder.iterdir())) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def _foreign(path: Path) -> None:
    save_file({"n": np.array([9])}, path)


def _changed(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Another array under the right metadata."""

    def change(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file(tensors | {name: value(tensors[name])}, path, metadata)

    return change


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        _cut,
        _garbage,
        _foreign,
        _changed("mean", lambda v: v * np.nan),
        _changed("mean", lambda v: v[:-1]),
        _changed("rows", lambda v: v.astype(np.float64)),
        _changed("rows", lambda v: v[:-1]),
        _changed("n", lambda v: v - 10),
        _changed("n", lambda v: np.array([9, 9])),
    ],
)
def test_a_broken_file_is_a_miss_and_one_line(cache: FeatureCache, said: list[str], spoil: Any) -> None:
    made = data_statistics(Counting().network, selection(PIXELS), 4, cache)
    (path,) = cache.folder.iterdir()
    spoil(path)
    again = Counting()
    assert same(data_statistics(again.network, selection(PIXELS), 4, cache), made)
    assert again.seen == 9
    assert len(said) == 1
    assert said[0].startswith(f"note: cached features {path} cannot be used (")
    assert "\n" not in said[0]
    healed = Counting()
    data_statistics(healed.network, selection(PIXELS), 4, cache)
    assert (healed.seen, len(said)) == (0, 1)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = FeatureCache(tmp_path / "file" / "features", said.append)
    counting = Counting()
    assert data_statistics(counting.network, selection(PIXELS), 4, cache) is not None
    assert len(said) == 1
    assert said[0].startswith("note: the features are not cached: cannot write")


def test_a_file_is_written_whole_and_readable(cache: FeatureCache) -> None:
    data_statistics(Counting().network, selection(PIXELS), 4, cache)
    (path,) = cache.folder.iterdir()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert path == cache.path(cache_key("h", "all", 9, 8, "k"))


def test_lines_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = FeatureCache(tmp_path)
    key = cache_key("h", "all", 9, 8, "k")
    _garbage(cache.path(key))
    assert cache.load(key) is None
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    usual = tmp_path / ".cache" / "hflow-rt" / "features"
    assert cache_folder() == usual
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == usual
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "else"))
    assert cache_folder() == tmp_path / "else" / "hflow-rt" / "features"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ConfigError, match="no home folder to keep features of data in; name a folder with --cache, or"):
        cache_folder()
