"""Commands that work in shards, on one machine or as one of many."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, refused
from PIL import Image

Command = Callable[..., Any]


@pytest.fixture
def model(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The latest run, beside a folder of seven pictures and something that is none."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/tiny")
    Path("photos").mkdir()
    for index in range(7):
        noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(f"photos/{index}.png")
    Path("photos/bad.png").write_text("no picture")
    return Path("runs/tiny")


def test_scores_of_a_folder(hflow: Command, model: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert "1 of 1 shards, 7 of 8 images, 1 refused: scores/" in ok(hflow("score", "photos")).out
    (rows,) = (parquet.read_table(path).to_pylist() for path in Path("scores").glob("*.parquet"))
    assert [row["name"] for row in rows if row["reason"]] == ["bad.png"]
    told = json.loads(ok(hflow("score", "photos", "-o", "many", "--shard", "2/3", "--json")).out)
    assert (told["done"], told["missing"]) == (1, [1, 3])
    result = hflow("shards", "many")
    assert (result.code, "missing: 1, 3" in result.out) == (1, True)
    assert "3 of 3 shards, 7 of 8 images" in ok(hflow("score", "photos", "-o", "many", "--shards", 3)).out
    assert "3 of 3 shards whole" in ok(hflow("shards", "many")).out


def test_by_several_processes(hflow: Command, model: Path) -> None:
    words = ["sample", "-n", 12, "--shards", 4, "--format", "npz", "--seed", 5, "--std", "0.5"]
    ok(hflow(*words, "-o", "one"))
    ok(hflow(*words, "-o", "two", "--processes", 2))
    for path in Path("one").iterdir():
        assert path.read_bytes() == (Path("two") / path.name).read_bytes(), path.name
    array = np.concatenate([np.load(path)["arr_0"] for path in sorted(Path("two").glob("*.npz"))])
    assert array.shape == (12, 16, 16, 3)


def test_a_process_that_fails_is_said(hflow: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    result = hflow("sample", "-n", 4, "--shards", 4, "--processes", 2, "-o", "out")
    assert result.code == 1
    assert "error: 2 of 2 processes did not end well; run this again to do what is left" in result.err
    assert "0 of 4 shards" in result.out


def test_latents_in_shards(hflow: Command, model: Path) -> None:
    ok(hflow("encode", "photos", "--shards", 2, "-o", "latents"))
    ok(hflow("decode", "latents/00002-of-00002.safetensors", "-o", "decoded/"))
    assert len([*Path("decoded").glob("*.png")]) == 3


def test_a_damaged_shard_is_done_again(hflow: Command, model: Path) -> None:
    words = ["sample", "-n", 4, "--shards", 2, "-o", "out"]
    ok(hflow(*words))
    path = Path("out/00001-of-00002.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[:700] + b"?" + whole[701:])
    result = hflow("shards", "out")
    assert (result.code, "damaged, to be done again: 1" in result.out) == (1, True)
    ok(hflow(*words))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["score", "photos", "--shard", "4/3"], "shards are numbered 1 to 3; found 4"),
        (["score", "photos", "--shard", "x"], "a shard is K/N such as 3/16; found 'x'"),
        (["score", "photos", "--shards", 2, "--shard", "1/3"], "--shards 2 and --shard 1/3 differ"),
        (["score", "photos", "--shards", 9], "8 images cannot be cut into 9 shards"),
        (["score", "nowhere"], "no images at nowhere"),
        (
            ["sample", "-n", 4, "--shards", 2, "-o", "s", "--latents", "l.safetensors"],
            "the images of a seed, and nothing",
        ),
        (
            ["encode", "photos", "--shards", 2, "-o", "l.safetensors"],
            "in shards one source of images goes into a folder",
        ),
        (["shards", "photos"], "photos has no plan.json"),
        (["score", "photos", "-o", "photos"], "photos holds 0.png and no plan of shards"),
    ],
)
def test_refused_in_one_line(hflow: Command, model: Path, words: list[object], line: str) -> None:
    refused(hflow(*words), line)


def test_another_seed_is_another_job(hflow: Command, model: Path) -> None:
    ok(hflow("sample", "-n", 4, "--shards", 2, "-o", "out"))
    refused(hflow("sample", "-n", 4, "--shards", 2, "-o", "out", "--seed", 1), "out is of another job: its settings is")
