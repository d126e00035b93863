"""Shards by Ray: what a machine refuses, and, where Ray is installed, a cluster of which all is killed but its head."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray_loopback import Loopback, on_loopback

from hflow_rt.data.sources import open_source
from hflow_rt.errors import BackendUnavailable, BundleError, DataError
from hflow_rt.runtime import load, ray_jobs
from hflow_rt.runtime.ray_jobs import Opening, here, in_tasks
from hflow_rt.runtime.session import Session
from hflow_rt.runtime.shards import Job, listed, pinned, state


@pytest.fixture(scope="module")
def session(tiny_run: Path) -> Session:
    return load(tiny_run, device="cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def begun(session: Session, out: Path, shards: int = 3, photos: Path | None = None) -> tuple[Opening, Job]:
    """A job whose plan is written, of six samples, or of encoding six photos."""
    inputs = None
    if photos is not None:
        with open_source(photos) as source:
            inputs = listed(source)
    job = Job(
        kind="sample" if photos is None else "encode",
        files="npz" if photos is None else "safetensors",
        family=session.manifest.family,
        model=session.manifest.identity(),
        backend=session.backend,
        images=6,
        inputs=inputs,
        shards=shards,
        settings={"seed": 3, "std": ["0.5"], "label": None, "keep": list(session.input_shapes)},
    )
    pinned(out, job)
    return Opening.of(out, session, "onnx", "cpu", photos), job


def test_a_machine_does_shards_of_what_it_opened_once(
    session: Session, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.make_archive("photos", "zip", "photos")  # which is to stay open
    opening, job = begun(session, Path("out"), photos=Path("photos.zip"))
    monkeypatch.chdir("/")
    opened = ray_jobs._opened.cache_info().misses
    assert [here(opening, job, shard) for shard in (1, 2, 3, 2)] == [True] * 4
    found = state(tmp_path / "out", job)
    assert (found.done, found.images) == ((1, 2, 3), 6)
    assert ray_jobs._opened.cache_info().misses == opened + 1


def test_a_machine_that_has_something_else_refuses(session: Session, photos: Path, tmp_path: Path) -> None:
    opening, job = begun(session, tmp_path / "out", photos=photos)
    other, _ = begun(session, tmp_path / "other", shards=2, photos=photos)
    with pytest.raises(DataError, match="must be one folder that every machine sees"):
        here(opening._replace(out=other.out), job, 1)
    with pytest.raises(DataError, match="must be one folder that every machine sees"):
        here(opening._replace(out=str(tmp_path / "nowhere")), job, 1)
    with pytest.raises(DataError, match="and here is"):
        here(opening._replace(model="hflow-emoji"), job, 1)
    Image.new("RGB", (16, 16)).save(photos / "new.png")
    with pytest.raises(DataError, match="must hold the same images on every machine"):
        here(opening, job, 1)
    assert state(tmp_path / "out", job).done == ()


def test_without_ray(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailable, match=r"--ray needs Ray: pip install 'hflow-rt\[ray\]'"):
        [*in_tasks("auto", *begun(session, tmp_path), [1], print)]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray, imported where it keeps to the loopback address."""
    with on_loopback():
        yield pytest.importorskip("ray", reason="Ray is not installed: pip install 'hflow-rt[ray]'")


def test_nobody_is_there(ray: Any, session: Session, tmp_path: Path) -> None:
    opening, job = begun(session, tmp_path)
    began = time.monotonic()
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(BackendUnavailable, match=f"nobody answers at {address}"):
            [*in_tasks(address, opening, job, [1], print)]
    with pytest.raises(DataError, match=r"--ray takes auto, local, HOST:PORT or ray://HOST:PORT; found 'there'"):
        [*in_tasks("there", opening, job, [1], print)]
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def cluster(ray: Any) -> Iterator[Loopback]:
    with closing(Loopback(1)) as made:
        yield made


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray
def test_what_goes_wrong_on_a_cluster_is_one_error(
    cluster: Loopback, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, job = begun(session, tmp_path)
    told: list[str] = []
    with pytest.raises(BundleError, match=r"nowhere does not exist; .* \(on "):
        [*in_tasks(cluster.address, opening._replace(model="nowhere"), job, [1, 2], told.append)]
    assert told == [f"Ray at {cluster.address}: 2 machines, 2 CPUs"]
    with monkeypatch.context() as patched:
        patched.setattr(ray_jobs, "__version__", "9.9")
        with pytest.raises(
            BackendUnavailable, match=r"must have hflow-rt 9\.9, and has .*; install the same everywhere"
        ):
            [*in_tasks(cluster.address, opening, job, [1], print)]

    def fatal(*_: Any) -> bool:
        os._exit(1)

    with monkeypatch.context() as patched:
        patched.setattr(ray_jobs, "_travelling", lambda: fatal)
        patched.setattr(ray_jobs, "RETRIES", 1)
        with pytest.raises(BackendUnavailable, match="shard 2 ended 2 processes"):
            [*in_tasks(cluster.address, opening, job, [2], print)]
    assert [*in_tasks(cluster.address, opening, job, [3], print)] == [3]
    assert state(tmp_path, job).done == (3,)


@pytest.mark.slow
def test_workers_a_machine_and_drivers_are_killed(cluster: Loopback, tiny_run: Path, tmp_path: Path) -> None:
    """And a driver interrupted, which leaves nothing half-written: the end is the same, every byte."""
    words = ["sample", str(tiny_run), "-n", "6000", "--shards", "20", "--format", "npz", "-o"]
    command = [sys.executable, "-m", "hflow_rt.cli", *words]
    quiet: dict[str, Any] = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "whole"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    out = tmp_path / "broken"

    def driver() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "broken", "--ray", cluster.address], env=dict(os.environ), **quiet)

    def at_work(more: int) -> None:
        """Until so many more shards are done and a task is running."""
        enough, until = len([*out.glob("*.json")]) + more, time.monotonic() + 60
        while len([*out.glob("*.json")]) < enough or not cluster.workers():
            assert time.monotonic() < until
            time.sleep(0.02)

    first = driver()
    at_work(2)
    first.send_signal(signal.SIGINT)
    assert first.wait(30) == 130
    assert not [path for path in out.iterdir() if path.name[0] == "."]
    second = driver()
    at_work(1)
    cluster.workers()[0].kill()
    at_work(2)
    second.kill()
    second.wait()
    third = driver()
    at_work(1)
    cluster.lose_machine()
    assert third.wait(60) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
