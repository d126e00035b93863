"""Shards: what they hold, that they are whole or not there, and that whoever comes later ends the job."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hflow_rt.data.sources import open_source
from hflow_rt.errors import DataError
from hflow_rt.runtime import load
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.files import load_latents
from hflow_rt.runtime.session import Session
from hflow_rt.runtime.shards import Job, cut, forget, is_done, listed, pinned, read_job, shard_name, state, work

SEED = {"seed": 3, "std": ["0.5"], "label": None}


@pytest.fixture
def session(tiny_run: Path) -> Session:
    return load(tiny_run, device="cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty pictures, of which one is broken and one too small."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(20):
        side = 8 if index == 13 else 16
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{index:02d}.png")
    (folder / "05.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def source(photos: Path) -> Iterator[Any]:
    with ExitStack() as stack:
        yield stack.enter_context(open_source(photos))


def job_of(session: Session, kind: Any, files: str, images: int, shards: int, source: Any = None) -> Job:
    return Job(
        kind=kind,
        files=files,
        family=session.manifest.family,
        model=session.manifest.checkpoint["sha256"],
        backend=session.backend,
        images=images,
        inputs=None if source is None else listed(source),
        shards=shards,
        settings=SEED,
    )


@pytest.mark.parametrize(("images", "shards"), [(20, 3), (7, 7), (1_000_003, 64)])
def test_every_image_is_in_one_shard(session: Session, images: int, shards: int) -> None:
    job = job_of(session, "sample", "tar", images, shards)
    parts = [cut(job, shard) for shard in range(1, shards + 1)]
    assert [number for part in parts[:3] for number in part] == list(range(parts[min(3, shards) - 1].stop))
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert parts[-1].stop == images
    assert {len(part) for part in parts} <= {images // shards, images // shards + 1}


def test_scores(session: Session, source: Any, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    job, out = job_of(session, "score", "parquet", 20, 3, source), tmp_path / "out"
    pinned(out, job)
    assert [work(session, out, job, shard, source) for shard in (1, 2, 3)] == [True] * 3
    table = [row for shard in (1, 2, 3) for row in parquet.read_table(out / shard_name(job, shard)).to_pylist()]
    assert [row["name"] for row in table] == [f"{index:02d}.png" for index in range(20)]
    assert table[5]["reason"] == "it is not an image that Pillow can read"
    assert "smaller than 16" in table[13]["reason"]
    for index, row in enumerate(table):
        if index in (5, 13):
            assert row["bits_per_dim"] is row["log_prob"] is None
            continue
        encoded = session.inverse(session.read(photos / row["name"]))
        assert row["log_prob"] == pytest.approx(float(encoded.log_prob[0]), rel=1e-4)
        assert row["bits_per_dim"] == pytest.approx(float(session.bits_per_dim(encoded.log_prob)[0]), rel=1e-4)
    found = state(out, job)
    assert (found.done, found.missing, found.images, found.refused) == ((1, 2, 3), (), 18, 2)


def test_latents(session: Session, source: Any, photos: Path, tmp_path: Path) -> None:
    job, out = job_of(session, "encode", "safetensors", 20, 2, source), tmp_path / "out"
    pinned(out, job)
    for shard in (1, 2):
        work(session, out, job, shard, source)
    latents, about = load_latents(out / shard_name(job, 1))
    assert about["images"] == [f"{index:02d}.png" for index in range(10) if index != 5]
    assert list(about["skipped"]) == ["05.png"]
    expected = session.inverse(session.read(photos / "07.png"))
    for name, values in expected.latents.items():
        np.testing.assert_allclose(latents[name][6], values[0], atol=1e-4)


def test_samples(session: Session, tmp_path: Path) -> None:
    expected = to_uint8(session.sample(40, std="0.5", seed=3))
    tar, out = job_of(session, "sample", "tar", 40, 2), tmp_path / "tar"
    pinned(out, tar)
    work(session, out, tar, 2, None)
    with tarfile.open(out / shard_name(tar, 2)) as archive:
        assert archive.getnames()[:2] == ["000000020.png", "000000020.json"]
        content = archive.extractfile("000000033.png")
        assert content is not None
        found = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB")).astype(int)
    assert abs(found - expected[33]).max() <= 1  # drawn in another batch
    npz, out = job_of(session, "sample", "npz", 40, 2), tmp_path / "npz"
    pinned(out, npz)
    work(session, out, npz, 1, None)
    array = np.load(out / shard_name(npz, 1))["arr_0"]
    assert (array.shape, array.dtype) == ((20, 16, 16, 3), np.uint8)
    assert abs(array.astype(int) - expected[:20]).max() <= 1


@pytest.mark.parametrize("files", ["tar", "npz"])
def test_done_again_it_is_the_same(session: Session, tmp_path: Path, files: str) -> None:
    job = job_of(session, "sample", files, 6, 2)
    contents = []
    for name in ("a", "b"):
        pinned(tmp_path / name, job)
        work(session, tmp_path / name, job, 2, None)
        contents.append((tmp_path / name / shard_name(job, 2)).read_bytes())
    assert contents[0] == contents[1]


def test_what_is_there_stays_and_what_is_damaged_goes(session: Session, tmp_path: Path) -> None:
    job = job_of(session, "sample", "npz", 6, 3)
    pinned(tmp_path, job)
    pinned(tmp_path, job)  # by another machine
    assert [work(session, tmp_path, job, shard, None) for shard in (1, 2, 3, 2)] == [True, True, True, False]
    whole = (tmp_path / shard_name(job, 2)).read_bytes()
    (tmp_path / shard_name(job, 2)).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert state(tmp_path, job).damaged == (2,)
    forget(tmp_path, job, 2)
    (tmp_path / shard_name(job, 3)).write_bytes(b"cut")
    assert [is_done(tmp_path, job, shard) for shard in (1, 2, 3)] == [True, False, False]
    assert [work(session, tmp_path, job, shard, None) for shard in (1, 2, 3)] == [False, True, True]
    assert (tmp_path / shard_name(job, 2)).read_bytes() == whole
    assert state(tmp_path, job).done == (1, 2, 3)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz", ".json"}


def test_another_job_is_refused(session: Session, source: Any, tmp_path: Path) -> None:
    job, out = job_of(session, "score", "parquet", 20, 3, source), tmp_path / "out"
    pinned(out, job)
    assert read_job(out) == job
    for name, value in {"model": "0" * 64, "shards": 4, "inputs": "other", "settings": {"seed": 4}}.items():
        with pytest.raises(DataError, match=f"is of another job: its {name} is"):
            pinned(out, job.model_copy(update={name: value}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    with pytest.raises(DataError, match=r"holds letter\.txt and no plan of shards"):
        pinned(tmp_path / "mine", job)
    with pytest.raises(DataError, match=r"has no plan\.json"):
        read_job(tmp_path / "mine")


def test_a_changed_input_is_another_job(photos: Path) -> None:
    def now() -> str:
        with open_source(photos) as source:
            return listed(source)

    before = now()
    (photos / "03.png").write_bytes(b"longer or shorter")
    changed = now()
    (photos / "99.png").write_bytes(b"new")
    assert len({before, changed, now()}) == 3


def test_one_at_a_time(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(session, "sample", "npz", 4, 1)
    pinned(tmp_path, job)
    held, go = threading.Event(), threading.Event()

    def slow(count: int) -> None:
        held.set()
        go.wait(20)

    thread = threading.Thread(target=work, args=(session, tmp_path, job, 1, None, slow))
    thread.start()
    held.wait(20)
    assert not work(session, tmp_path, job, 1, None)
    go.set()
    thread.join()
    assert state(tmp_path, job).done == (1,)


def test_a_full_disk_leaves_nothing(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(session, "sample", "npz", 4, 1)
    pinned(tmp_path, job)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(DataError, match="No space left"):
            work(session, tmp_path, job, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert work(session, tmp_path, job, 1, None)


@pytest.mark.slow
def test_killed_at_any_time_and_run_again(tiny_run: Path, tmp_path: Path) -> None:
    words = ["sample", str(tiny_run), "-n", "3000", "--shards", "30", "--format", "npz", "-o"]
    command = [sys.executable, "-m", "hflow_rt.cli", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*command, str(tmp_path / "whole")]
    subprocess.run(
        whole, check=True, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    broken = [*command, str(tmp_path / "broken")]
    rng = np.random.default_rng(1)
    for _ in range(4):
        process = subprocess.Popen(
            broken, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 20
        while not [*(tmp_path / "broken").glob(".0*")] and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)  # until a shard is begun
        time.sleep(float(rng.uniform(0, 0.3)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(
        broken, check=True, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "broken").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    assert json.loads((tmp_path / "whole" / "plan.json").read_text())["shards"] == 30
