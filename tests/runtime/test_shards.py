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
from hflow_rt.errors import DataError, NoInverse
from hflow_rt.runtime import load
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.files import as_made, how_made, load_latents
from hflow_rt.runtime.latents.operations import check_latents
from hflow_rt.runtime.latents.round_trips import decoded
from hflow_rt.runtime.session import Session
from hflow_rt.runtime.shard_files import encoding_settings
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


def job_of(
    session: Session, kind: Any, files: str, images: int, shards: int, source: Any = None, settings: Any = None
) -> Job:
    return Job(
        kind=kind,
        files=files,
        family=session.manifest.family,
        model=session.manifest.checkpoint["sha256"],
        backend=session.backend,
        images=images,
        inputs=None if source is None else listed(source),
        shards=shards,
        settings=settings or SEED,
    )


def encoding_of(session: Session, photos: Path, source: Any, kind: Any, files: str, shards: int, **how: Any) -> Job:
    settings = encoding_settings(session, 3, how.get("keep"), None, photos, files, scores=kind == "score")
    return job_of(session, kind, files, 20, shards, source, settings)


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
    job, out = encoding_of(session, photos, source, "score", "parquet", 3), tmp_path / "out"
    assert job.settings["keep"] == ["bits_per_dim", "log_prob", "end0", "end1"]  # of more numbers are the others
    pinned(out, job)
    assert [work(session, out, job, shard, source) for shard in (1, 2, 3)] == [True] * 3
    table = [row for shard in (1, 2, 3) for row in parquet.read_table(out / shard_name(job, shard)).to_pylist()]
    assert [row["name"] for row in table] == [f"{index:02d}.png" for index in range(20)]
    assert table[5]["reason"] == "not an image: it is not an image that Pillow can read"
    assert "smaller than 16" in table[13]["reason"]
    for index, row in enumerate(table):
        if index in (5, 13):
            assert row["bits_per_dim"] is row["log_prob"] is None
            assert np.isnan(row["end1"]).all()
            continue
        encoded = session.inverse(session.read(photos / row["name"]))
        assert row["log_prob"] == pytest.approx(float(encoded.log_prob[0]), rel=1e-4)
        assert row["bits_per_dim"] == pytest.approx(float(session.bits_per_dim(encoded.log_prob)[0]), rel=1e-4)
        np.testing.assert_allclose(row["end1"], encoded.latents["end1"].reshape(-1), atol=1e-4)
    found = state(out, job)
    assert (found.done, found.missing, found.images, found.refused) == ((1, 2, 3), (), 18, 2)


def test_latents(session: Session, source: Any, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    found = {}
    for files in ("safetensors", "parquet"):
        job, out = encoding_of(session, photos, source, "encode", files, 2), tmp_path / files
        pinned(out, job)
        for shard in (1, 2):
            work(session, out, job, shard, source)
        found[files] = out / shard_name(job, 1)
    latents, about = load_latents(found["safetensors"])
    assert about["images"] == [f"{index:02d}.png" for index in range(10) if index != 5]
    assert list(about["skipped"]) == ["05.png"]
    expected = session.inverse(session.read(photos / "07.png"))
    for name, values in expected.latents.items():
        np.testing.assert_allclose(latents[name][6], values[0], atol=1e-4)
    table = parquet.read_table(found["parquet"])
    shapes = json.loads(table.schema.metadata[b"hflow_rt.latents"])["shapes"]
    assert {name: tuple(shape) for name, shape in shapes.items()} == session.input_shapes
    assert table["log_prob"].to_pylist()[:5] == about["log_prob"][:5]
    for name, shape in shapes.items():
        values = table[name].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
        np.testing.assert_array_equal(np.delete(values, 5, axis=0), latents[name])


def test_what_is_kept(session: Session, source: Any, photos: Path, tmp_path: Path) -> None:
    scores, latents = ["bits_per_dim", "log_prob"], list(session.latent_shapes)
    for keep, names in [("z", latents[-1:]), ("log_prob, z0", ["log_prob", "z0"]), ("all", scores + latents)]:
        job = encoding_of(session, photos, source, "encode", "safetensors", 2, keep=keep)
        assert job.settings["keep"] == [name for name in scores + latents if name in names or name[0] == keep]
    job = encoding_of(session, photos, source, "encode", "safetensors", 20, keep="log_prob,z0")
    pinned(tmp_path / "out", job)
    work(session, tmp_path / "out", job, 1, source)
    found, about = load_latents(tmp_path / "out" / shard_name(job, 1))
    assert (list(found), len(about["log_prob"]), "bits_per_dim" in about) == (["z0"], 1, False)
    work(session, tmp_path / "out", job, 6, source)  # of the broken one alone
    assert load_latents(tmp_path / "out" / shard_name(job, 6))[0]["z0"].shape == (0, *session.latent_shapes["z0"])
    known = f"which has all, {', '.join(scores + latents)}"
    with pytest.raises(DataError, match=f"unknown 'zz' in --keep of this hflow model, {known}"):
        encoding_of(session, photos, source, "encode", "parquet", 2, keep="zz")
    with pytest.raises(DataError, match="safetensors holds latents, and --keep log_prob names none"):
        encoding_of(session, photos, source, "encode", "safetensors", 2, keep="log_prob")


def test_latents_of_many_steps_know_how_they_were_made_and_what_they_give_back(
    many_steps: Path, photos: Path, source: Any, tmp_path: Path
) -> None:
    """Also beside a broken image: calls are filled up."""
    session = load(many_steps, device="cpu").in_steps(2)
    job = encoding_of(session, photos, source, "encode", "safetensors", 2)
    job = job.model_copy(update={"settings": job.settings | {"steps": 2}})
    pinned(tmp_path / "out", job)
    work(session, tmp_path / "out", job, 1, source)
    path = tmp_path / "out" / shard_name(job, 1)
    latents, about = load_latents(path)
    again = as_made(load(many_steps, device="cpu"), [path])
    check_latents(latents, again.input_shapes, "a shard")
    trip = how_made(about, "a shard").round_trip
    assert trip is not None
    assert (trip.backend, trip.batch, len(trip.largest_difference)) == (session.backend, 16, 9)
    back = np.concatenate([to_uint8(part) for part in decoded(again, latents, batch=trip.batch)])
    sides = np.stack([session.read(photos / name)[0] for name in about["images"]])
    off = abs(back.astype(int) - to_uint8(sides)).reshape(9, -1).max(1)
    assert tuple(off) == trip.largest_difference
    assert trip.exact > 0
    Image.new("RGB", (16, 16), "red").save(photos / "05.png")  # so that none is broken: the others have what they had
    with open_source(photos) as mended:
        whole = encoding_of(session, photos, mended, "encode", "safetensors", 2)
        whole = whole.model_copy(update={"settings": whole.settings | {"steps": 2}})
        pinned(tmp_path / "whole", whole)
        work(session, tmp_path / "whole", whole, 1, mended)
    for name, values in load_latents(tmp_path / "whole" / shard_name(whole, 1))[0].items():
        np.testing.assert_array_equal(np.delete(values, 5, 0), latents[name])
    assert "largest_difference" not in encoding_of(session, photos, source, "score", "parquet", 2).settings["keep"]


def test_without_an_inverse_nothing_is_begun(slots_run: Path, photos: Path, source: Any) -> None:
    with pytest.raises(NoInverse, match="hflow-rt project"):
        encoding_of(load(slots_run, device="cpu"), photos, source, "score", "parquet", 2)


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
    others = {"model": "0" * 64, "number of shards": 4, "list of inputs": "other", "seed": {**SEED, "seed": 4}}
    fields = ("model", "shards", "inputs", "settings")
    for field, (name, value) in zip(fields, others.items(), strict=True):
        with pytest.raises(DataError, match=f"is of another job: its {name} is .*; say what 'hflow-rt shards"):
            pinned(out, job.model_copy(update={field: value}))
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


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of the size of files")
@pytest.mark.parametrize(
    ("kind", "files"),
    [("score", "parquet"), ("encode", "parquet"), ("encode", "safetensors"), ("sample", "tar"), ("sample", "npz")],
)
def test_a_disk_that_is_full_in_the_middle(
    session: Session, source: Any, photos: Path, tmp_path: Path, kind: Any, files: str
) -> None:
    """The system writes a part of a file and then no more, as on a full disk; it stands in for that."""
    import resource

    out = tmp_path / "out"
    if kind == "sample":
        job = job_of(session, kind, files, 40, 1)
    else:
        job = encoding_of(session, photos, source, kind, files, 1)
    pinned(out, job)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*File too large; free space"):
            work(session, out, job, 1, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    assert work(session, out, job, 1, source)
    assert state(out, job).done == (1,)


def test_of_many_jobs_that_begin_at_once_one_is_not_refused(session: Session, tmp_path: Path) -> None:
    jobs = [job_of(session, "sample", "npz", 40, shards) for shards in range(1, 17)]
    ready, begun, refused = threading.Barrier(len(jobs)), list[Job](), list[str]()

    def begin(job: Job) -> None:
        ready.wait(20)
        try:
            pinned(tmp_path / "out", job)
            begun.append(job)
        except DataError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun == [read_job(tmp_path / "out")]
    assert len(refused) == 15
    assert all("is of another job: its number of shards is" in line for line in refused)


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
