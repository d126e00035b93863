"""Commands that work in shards, on one machine or as one of many."""

import json
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, refused
from PIL import Image

import hflow_rt
from hflow_rt.cli.score import _bundled, _ranges
from hflow_rt.files import locked
from hflow_rt.manifest import read_manifest

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


@pytest.mark.parametrize(
    "words",
    [
        ("score", "photos", "--keep", "log_prob,end", "--shard", "2/3"),
        ("encode", "photos", "--format", "parquet", "--seed", "4", "--shard", "2/3"),
        ("sample", "-n", "6", "--std", "0.5", "--std", "z0=0.4", "--seed", "1", "--shard", "2/3"),
    ],
)
def test_the_command_that_is_shown_goes_on(hflow: Command, model: Path, words: tuple[str, ...]) -> None:
    """By who has nothing but the folder and knows where images and model are, and by who began."""
    pytest.importorskip("pyarrow")
    for out in ("a job", "another"):
        begun = ok(hflow(*words, "-o", out)).out.splitlines()
        looked = hflow("shards", out).out.splitlines()
        line = looked[-1].removeprefix("next: ") if out == "a job" else begun[-1].strip()
        known = shlex.split(line.replace("IMAGES", "photos").replace("MODEL", str(model)))
        assert "3 of 3 shards" in ok(hflow(*known[1:])).out


def test_by_several_processes(hflow: Command, model: Path) -> None:
    words = ["sample", "-n", 12, "--shards", 4, "--format", "npz", "--seed", 5, "--std", "0.5"]
    ok(hflow(*words, "-o", "one"))
    ok(hflow(*words, "-o", "two", "--processes", 2))
    for path in Path("one").iterdir():
        assert path.read_bytes() == (Path("two") / path.name).read_bytes(), path.name
    array = np.concatenate([np.load(path)["arr_0"] for path in sorted(Path("two").glob("*.npz"))])
    assert array.shape == (12, 16, 16, 3)
    assert "12 images: all.npz" in ok(hflow("shards", "two", "--join", "all.npz")).out
    with np.load("all.npz") as joined:
        assert list(joined) == ["arr_0"]
        np.testing.assert_array_equal(joined["arr_0"], array)
    Path("two/00001-of-00004.npz").unlink()
    assert hflow("shards", "two", "--join", "part.npz").code == 1
    assert not Path("part.npz").exists()


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


@pytest.mark.parametrize("kind", ["tar shards", "parquet", "npy"])
def test_other_sources(hflow: Command, model: Path, kind: str) -> None:
    """What is read of any source is what is read of the files."""
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    files = [Path(f"photos/{index}.png") for index in range(7)]
    Path("set").mkdir()
    source = "set"
    if kind == "npy":
        source = "set/photos.npy"
        np.save(source, np.stack([np.asarray(Image.open(path)) for path in files]))
    elif kind == "parquet":
        parquet.write_table(arrow.table({"image": [path.read_bytes() for path in files]}), "set/a.parquet")
    else:
        for name, part in (("a.tar", files[:3]), ("b.tar", files[3:])):
            with tarfile.open(f"set/{name}", "w") as archive:
                for path in part:
                    archive.add(path)
    Path("photos/bad.png").unlink()
    scores = []
    for place in ("photos", source):
        out = f"of-{Path(place).name}"
        ok(hflow("score", place, "--shards", 2, "-o", out, "--keep", "log_prob"))
        tables = [parquet.read_table(path) for path in sorted(Path(out).glob("*.parquet"))]
        scores.append(arrow.concat_tables(tables)["log_prob"].to_pylist())
    assert scores[0] == scores[1]


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
            "shards go into a folder; say -o",
        ),
        (["encode", "photos", "--keep", "z0"], "--keep and --format are for jobs in shards; say --shards"),
        (["score", "photos", "--keep", "x"], "unknown 'x' in --keep of this hflow model, which has all, bits_per_dim"),
        (["score", "photos", "--label", "cat"], "this model knows no classes; omit 'cat'"),
        (["shards", "photos"], "photos has no plan.json"),
        (["score", "photos", "-o", "photos"], "photos holds 0.png and no plan of shards"),
    ],
)
def test_refused_in_one_line(hflow: Command, model: Path, words: list[object], line: str) -> None:
    refused(hflow(*words), line)


def test_another_seed_is_another_job(hflow: Command, model: Path) -> None:
    ok(hflow("sample", "-n", 4, "--shards", 2, "-o", "out"))
    again = hflow("sample", "-n", 4, "--shards", 2, "-o", "out", "--seed", 1)
    refused(again, "out is of another job: its seed is 0, not 1")
    refused(hflow("sample", "-n", 4, "--shards", 2), "shards go into a folder; say -o, such as -o samples/")


def test_what_is_wrong_is_said_before_anything_is_pinned(hflow: Command, model: Path) -> None:
    for wrong, line in (("--std=abc", "std"), ("--seed=-1", "seed"), ("--label=cat", "no classes")):
        assert line in hflow("sample", "-n", 4, "--shards", 2, "-o", "out", wrong).err
        assert not Path("out").exists()


def test_a_shard_that_somebody_else_is_at_is_not_done(hflow: Command, model: Path) -> None:
    Path("out").mkdir()
    with locked(Path("out/.00002-of-00002.npz.lock")):
        words = ("sample", "-n", 4, "--shards", 2, "--format", "npz", "-o", "out")
        assert hflow(*words).code == 1
        assert hflow(*words, "--shard", "1/2").code == 0
    ok(hflow(*words))


def test_missing_shards_are_told_as_ranges_and_a_bundled_model_by_name() -> None:
    assert _ranges((1, 2, 3, 7, 9, 10)) == "1-3, 7, 9-10"
    assert _bundled(read_manifest(hflow_rt.pretrained()).identity()) == Path("ihdm-emoji")
    assert _bundled("0" * 64) == Path("MODEL")
    manifest = read_manifest(hflow_rt.pretrained())  # whose samples differ
    assert manifest.model_copy(update={"std": ("1",)}).identity() != manifest.identity()
