"""Which images of a set are looked at."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_rt.data.selection import SPLITS, select
from hflow_rt.errors import ConfigError, DataError


def save_greys(folder: Path, count: int) -> Path:
    """Images of one grey each: image `07.png` has grey 7, and no name says which are held out."""
    folder.mkdir()
    for grey in range(count):
        Image.new("RGB", (4, 4), (grey, grey, grey)).save(folder / f"{grey:02}.png")
    return folder


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    return save_greys(tmp_path / "greys", 40)


def test_train_and_test_are_all(greys: Path) -> None:
    chosen = {split: select(greys, 4, split) for split in SPLITS}
    both = [*chosen["train"].indices, *chosen["test"].indices]
    assert sorted(both) == list(chosen["all"].indices) == list(range(40))
    assert str(chosen["test"]) == f"{len(chosen['test'])} held-out images of {greys}"
    assert chosen["train"].held_out is not None
    assert list(chosen["train"].held_out.indices) == list(chosen["test"].indices)
    assert chosen["test"].held_out is chosen["all"].held_out is None
    assert select(save_greys(greys.parent / "few", 3), 4, "train").held_out is None
    for one in chosen.values():
        assert one.names == [one.images.names[index] for index in one.indices]
        np.testing.assert_array_equal(one.pixels()[:, 0, 0, 0], one.indices)
        np.testing.assert_array_equal(one.pixels(range(1, 3)), one.pixels()[1:3])
        np.testing.assert_array_equal(one.pixels(np.array([1, 0, 1])), one.pixels()[[1, 0, 1]])


def test_a_limit_takes_evenly_spaced_ones(greys: Path) -> None:
    assert list(select(greys, 4, "all", 4).indices) == [0, 13, 26, 39]
    assert len(select(greys, 4, "all", 400)) == 40


def test_what_cannot_be_selected(greys: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown split 'dev'; known: test, train, all"):
        select(greys, 4, "dev")
    with pytest.raises(DataError, match="must be at least 1, not 0"):
        select(greys, 4, "test", 0)
    with pytest.raises(DataError, match="one has no held-out images; give more images or another --split"):
        select(save_greys(tmp_path / "one", 1), 4)
    with pytest.raises(DataError, match="the demo images do not fit this 128x128 model; name images of your own"):
        select(None, 128)


def test_selecting_needs_no_torch() -> None:
    code = "import sys, hflow_rt.data.selection; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
