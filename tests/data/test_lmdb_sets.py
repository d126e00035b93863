"""LMDB sets of images, as published training scripts write them."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_rt.data.dataset import open_dataset
from hflow_rt.data.image_files import Skipped
from hflow_rt.data.sources import open_source
from hflow_rt.errors import DataError

lmdb = pytest.importorskip("lmdb")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, values: Mapping[str, bytes], subdir: bool = True) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with lmdb.open(str(path), map_size=1 << 20, subdir=subdir) as environment, environment.begin(write=True) as t:
            for key, value in values.items():
                t.put(key.encode(), value)
        return path

    return written


def raw(index: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def test_raw_and_encoded_values_come_by_number(write: Write) -> None:
    values = {str(index): raw(index).tobytes() for index in range(11)} | {"2": png(raw(2)), "3": b"something"}
    path = write("train.lmdb", values)
    with open_source(path) as source:
        found = dict(source)
        assert [*source.listing] == [(f"{index}.ppm", len(values[str(index)])) for index in range(11)]
    assert list(found) == [f"{index}.ppm" for index in range(11)]
    for index in range(11):
        image = found[f"{index}.ppm"]
        if index == 3:
            assert isinstance(image, Skipped)
            assert image.reason == "not an image"
        else:
            assert isinstance(image, Image.Image)
            assert np.array_equal(np.asarray(image), raw(index))


def test_sets_beside_each_other_are_splits(write: Write) -> None:
    write("set/train.lmdb", {str(index): raw(index).tobytes() for index in range(3)})
    write("set/validation.lmdb", {"0": raw(9).tobytes()}, subdir=False)
    images = open_dataset(write("set/other", {}).parent, 8)
    trained_on, held_out = images.split()
    assert [images.names[index] for index in (*trained_on, *held_out)] == [
        "train/0.ppm", "train/1.ppm", "train/2.ppm", "validation/0.ppm",
    ]  # fmt: skip
    assert len(held_out) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "has no keys; it must hold images under the keys 0, 1"),
        ({"a": b"x"}, r"decimal numbers, .* found b'a'"),
        ({"0": b"x", "2": b"x"}, "lacks the key 1; it must hold images under the keys 0 to 2"),
        ({"1": b"x"}, "lacks the key 0"),
        ({"0": b"x", "00": b"x"}, "has the key 0 twice"),
    ],
)
def test_other_databases_are_refused(write: Write, values: dict[str, bytes], message: str) -> None:
    path = write("x.lmdb", values)
    with pytest.raises(DataError, match=message), open_source(path):
        pass


def test_a_broken_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.lmdb").write_bytes(b"nothing" * 999)
    with pytest.raises(DataError, match=r"x\.lmdb is not a whole LMDB \(.*\); copy it again"), open_source(tmp_path):
        pass
