"""Parquet files with image bytes: which layouts are understood, and that only what is asked for is read."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hflow_rt.data.dataset import open_dataset
from hflow_rt.data.image_files import Skipped
from hflow_rt.data.sources import open_source
from hflow_rt.errors import BackendUnavailable, DataError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)


def png(index: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(index)).save(stream, "png")
    return stream.getvalue()


def write(path: Path, rows: int = 50, first: int = 0, group: int = 20, **columns: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    found = columns or {"label": range(rows), "jpg": pa.array([png(first + row) for row in range(rows)])}
    parquet.write_table(
        pa.table({name: pa.array(values) for name, values in found.items()}), path, row_group_size=group
    )
    return path


def test_rows_of_all_files_are_images_by_number(tmp_path: Path) -> None:
    write(tmp_path / "set" / "b.parquet", 30, 50)
    write(tmp_path / "set" / "a.parquet", 50)
    (tmp_path / "set" / "README.md").write_text("about")
    with open_source(tmp_path / "set") as source:
        assert len(source) == 80
        assert [*source.listing] == [
            (name, (tmp_path / "set" / name).stat().st_size) for name in ("a.parquet", "b.parquet")
        ]
        for part in (range(80), range(15, 25), range(45, 55), range(79, 80)):
            found = [*source.part(part)]
            assert [name for name, _ in found] == [
                f"a.parquet/{index:06}" if index < 50 else f"b.parquet/{index - 50:06}" for index in part
            ]
            for index, (_, image) in zip(part, found, strict=True):
                np.testing.assert_array_equal(image, pixels(index))
    with open_source(tmp_path / "set" / "b.par*") as matching, open_source(tmp_path / "set" / "b.parquet") as one:
        assert (
            [name for name, _ in matching] == [name for name, _ in one] == [f"b.parquet/{row:06}" for row in range(30)]
        )


def test_only_the_row_groups_that_it_takes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    read: list[tuple[list[int], list[str]]] = []

    class Counted(parquet.ParquetFile):
        def iter_batches(self, size: int, row_groups: list[int], columns: list[str]) -> Any:
            read.append((row_groups, columns))
            return super().iter_batches(size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(parquet, "ParquetFile", Counted)
    with open_source(path) as source:
        assert read == []
        assert len([*source.part(range(21, 39))]) == 18
        assert read == [([1], ["jpg"])]


def test_the_layout_of_hugging_face(tmp_path: Path) -> None:
    rows = [{"bytes": png(0), "path": "boot/1.png"}, {"bytes": png(1), "path": None}, {"bytes": None, "path": "x.png"}]
    rows += [None, {"bytes": b"words", "path": None}, {"bytes": png(5)[:60], "path": None}]  # type: ignore[list-item]
    path = write(tmp_path / "a.parquet", mask=pa.array([b"x"] * 6), image=pa.array(rows, HUGGING_FACE))
    with open_source(path) as source:
        found = dict(source)
    names = ["000000/boot/1.png", "000001", "000002/x.png", "000003", "000004", "000005"]
    assert [*found] == [f"a.parquet/{name}" for name in names]
    reasons = [image.reason if isinstance(image, Skipped) else None for image in found.values()]
    assert reasons == [None, None, "empty file", "empty file", "not an image", "broken image"]
    images = open_dataset(path, 8)
    assert images.unused == {
        "a.parquet/000002/x.png": "empty file",
        "a.parquet/000003": "empty file",
        "a.parquet/000004": "not an image",
        "a.parquet/000005": "broken image",
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": ["a"], "size": [1]},
            r"must have a column of image bytes, .* it has image \(string\), size \(int64\)",
        ),
        ({"a": [b"x"], "b": [b"x"]}, r"must have a column of image bytes"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=message), open_source(path):
        pass


@pytest.mark.parametrize("damage", [lambda data: b"words", lambda data: data[:-9], lambda data: b""])
def test_a_damaged_one_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / "a.parquet")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file"), open_source(path):
        pass


def test_damage_inside_is_said_when_it_is_met(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    data = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    with open_source(path) as source:
        assert len([*source.part(range(20))]) == 20
        with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file"):
            [*source.part(range(20, 40))]


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BackendUnavailable, match=r"reading parquet needs pyarrow: pip install 'hflow-rt\[shards\]'"):
        open_source(path).__enter__()
