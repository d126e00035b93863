"""Jobs in shards, proved and measured: workers killed at random, memory by number of images, processes against one.

python benchmarks/shards_proof.py [--kills 100] [--only memory|rate|kills] > benchmarks/results/shards.md
python benchmarks/shards_proof.py --ray [--kills 100] >> benchmarks/results/shards.md
"""

import argparse
import io
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from ray_loopback import Loopback, on_loopback

COMMAND = [sys.executable, "-m", "hflow_rt.cli"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
SHARDS = 16

# of hflow-emoji: what is measured, its command, and which source of images it reads
JOBS = {
    "samples, npz": ("sample --model hflow-emoji --format npz", None),
    "scores of a folder": ("score --model hflow-emoji", "photos"),
    "encodings of webdataset shards, parquet": ("encode --model hflow-emoji --format parquet", "tars"),
    "encodings of parquet, safetensors": ("encode --model hflow-emoji --format safetensors", "tables"),
}


def sources(folder: Path, images: int) -> Path:
    """The same images, of which one in fifty is broken, as a folder, as tars of a hundred and as parquet."""
    rng, encoded = np.random.default_rng(0), []
    for index in range(images):
        content = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        small.resize((80, 64), Image.Resampling.BILINEAR).save(content, "PNG")
        encoded.append(b"no image" if index % 50 == 7 else content.getvalue())
    for name in ("photos", "tars", "tables"):
        (folder / name).mkdir(parents=True)
    for index, content in enumerate(encoded):
        (folder / "photos" / f"{index:06}.png").write_bytes(content)
    for start in range(0, images, 100):
        with tarfile.open(folder / "tars" / f"{start:06}.tar", "w") as archive:
            for index in range(start, min(start + 100, images)):
                archive.add(folder / "photos" / f"{index:06}.png", f"{index:06}.png")
    table = pyarrow.table({"image": encoded})
    pyarrow.parquet.write_table(table, folder / "tables" / "all.parquet", row_group_size=100)
    return folder


def job(name: str, folder: Path, out: Path, images: int, shards: int = SHARDS, *more: str) -> list[str]:
    """The command of a job."""
    words, source = JOBS[name]
    of = ["-n", str(images)] if source is None else [str(folder / source)]
    return [*COMMAND, *words.split(), *of, "--shards", str(shards), "-o", str(out), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(folder: Path, kills: int, name: str) -> str:
    """Two workers at one job, both killed at random, run again until that has been so often; every byte compared."""
    rng, images, shards = np.random.default_rng(0), 600, 150
    of = sources(folder / "killed" / name, images)

    def command(out: Path) -> list[str]:
        return job(name, of, out, images, shards)

    subprocess.run(command(of / "whole"), check=True, cwd=folder, env=ONE_THREAD, **QUIET)
    whole, done, rounds = contents(of / "whole"), 0, 0
    while done < kills:
        rounds += 1
        out = of / f"broken-{rounds}"
        while done < kills:
            workers = [subprocess.Popen(command(out), cwd=folder, env=ONE_THREAD, **QUIET) for _ in range(2)]
            time.sleep(float(rng.uniform(0.5, 3.0)))
            alive = sum(worker.poll() is None for worker in workers)
            for worker in workers:
                worker.send_signal(signal.SIGKILL)
                worker.wait()
            done += alive
            if not alive:
                break  # the job is done; another one
        subprocess.run(command(out), check=True, cwd=folder, env=ONE_THREAD, **QUIET)
        found = contents(out)
        if found != whole:
            different = [one for one in whole.keys() | found.keys() if whole.get(one) != found.get(one)]
            return f"DIFFERENT after {done} kills: {different[:5]}"
    return (
        f"{name}: {done} workers of {rounds} jobs of {shards} shards killed at random (SIGKILL), each job run to its"
        f" end: {len(whole)} files, every byte as in the undisturbed one, none left over"
    )


def peak(command: list[str], folder: Path) -> float:
    """MiB of the largest process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL,"
        " stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=folder, env=ONE_THREAD, capture_output=True, text=True
    )
    return int(ran.stdout) / 1024


def seconds(folder: Path, name: str, images: int, *more: str) -> float:
    began = time.monotonic()
    command = job("samples, npz", folder, folder / name, images, SHARDS, *more)
    subprocess.run(command, check=True, cwd=folder, env=ONE_THREAD, **QUIET)
    return time.monotonic() - began


def memory(folder: Path) -> None:
    print(f"Peak MiB of one process, {SHARDS} shards, by number of images:\n")
    print("| images | " + " | ".join(JOBS) + " |\n|---:|" + "---:|" * len(JOBS))
    for images in (100, 400, 1600, 6400):
        of = sources(folder / f"of-{images}", images)
        found = [peak(job(name, of, of / f"out-{index}", images), folder) for index, name in enumerate(JOBS)]
        print(f"| {images:,} | " + " | ".join(f"{value:.0f}" for value in found) + " |", flush=True)


def rates(folder: Path) -> None:
    """In turns, of jobs of two sizes, so with the start and without it."""
    few, many, pairs = 400, 2000, []
    for turn in range(3):
        one, two = (
            [seconds(folder, f"{way}{turn}-{images}", images, *more) for images in (few, many)]
            for way, more in (("one", ()), ("two", ("--processes", "2")))
        )
        pairs.append((many / one[1], many / two[1], (many - few) / (one[1] - one[0]), (many - few) / (two[1] - two[0])))
    one, two, alone, together = np.median(pairs, axis=0)
    print(
        f"\nOnce started, one process {alone:.0f} images/s, two {together:.0f}: {together / alone / 2:.2f} of twice as"
        f" many. A job of {many:,} images, start included: {one:.0f} and {two:.0f}, {two / one / 2:.2f}."
    )


def there(out: Path) -> int:
    """Shards that are done."""
    return len([*out.glob("*.npz.json")])


def killed_on_ray(cluster: Loopback, folder: Path, kills: int) -> str:
    """As `killed`, of the workers, the second machine and the driver of a cluster; every job is run to its end."""
    rng, images, shards = np.random.default_rng(0), 600, 150
    subprocess.run(
        job("samples, npz", folder, folder / "whole", images, shards), check=True, cwd=folder, env=ONE_THREAD, **QUIET
    )
    whole, jobs, runs = contents(folder / "whole"), 0, 0
    done = dict.fromkeys(("workers", "machines", "drivers"), 0)
    while sum(done.values()) < kills:
        jobs += 1
        out = folder / f"broken-{jobs}"
        command = job("samples, npz", folder, out, images, shards, "--ray", cluster.address)
        ended = False
        while not ended:
            runs += 1
            driver = subprocess.Popen(command, cwd=folder, env=dict(os.environ), **QUIET)
            enough = there(out) + int(
                rng.integers(0, 8)
            )  # by shards, not by seconds, so that a busy machine gets on, too
            while driver.poll() is None:
                time.sleep(float(rng.uniform(0, 0.5)))
                workers = cluster.workers()
                if sum(done.values()) == kills or not workers or there(out) < enough:
                    continue
                what = str(rng.choice([*done], p=[0.8, 0.1, 0.1]))
                enough = there(out) + int(rng.integers(0, 8))
                if what == "workers":
                    workers[rng.integers(len(workers))].kill()
                elif what == "machines":
                    cluster.lose_machine()
                else:
                    driver.kill()
                done[what] += 1
                print(f"job {jobs}, run {runs}: {done}", file=sys.stderr)
            ended = driver.wait() == 0
        found = contents(out)
        if found != whole:
            different = [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]
            return f"DIFFERENT after {done} kills: {different[:5]}"
    told = ", ".join(f"{count} {what}" for what, count in done.items())
    return (
        f"Ray, two machines on loopback: {told} of {jobs} jobs of {shards} shards killed at random (SIGKILL), each job"
        f" run until it ended well, {runs} times in all: {len(whole)} files, every byte as in the undisturbed one,"
        " none left over"
    )


def shards_on_ray(cluster: Loopback, folder: Path) -> str:
    """What a shard of one image takes by Ray and by as many processes: from jobs of two sizes, so without the start."""
    few, many, each = 100, 500, {}
    for name, more in {"Ray": ("--ray", cluster.address), "--processes": ("--processes", "2")}.items():
        seconds = []
        for shards in (few, many):
            began = time.monotonic()
            command = job("samples, npz", folder, folder / f"cost{name}{shards}", shards, shards, *more)
            subprocess.run(command, check=True, cwd=folder, env=dict(os.environ), **QUIET)
            seconds.append(time.monotonic() - began)
        each[name] = ((seconds[1] - seconds[0]) / (many - few), seconds[0])
    (ray, ray_start), (processes, start) = each["Ray"], each["--processes"]
    return (
        f"A shard of one image, two at a time: {1000 * ray:.1f} ms by Ray, {1000 * processes:.1f} ms by --processes, so"
        f" {1000 * (ray - processes):.1f} ms are Ray's. {few} of them, start included, took {ray_start:.0f} s and"
        f" {start:.0f} s"
    )


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of every job")
    parser.add_argument("--only", choices=("memory", "rate", "kills"))
    parser.add_argument("--ray", action="store_true", help="the part that is of Ray")
    asked = parser.parse_args()

    def kills(folder: Path) -> None:
        for name in JOBS:
            print(f"\n{killed(folder, asked.kills, name)}.", flush=True)

    parts: dict[str, Callable[[Path], None]] = {"memory": memory, "rate": rates, "kills": kills}
    with tempfile.TemporaryDirectory() as name:
        if asked.ray:
            with on_loopback(), closing(Loopback(1)) as cluster:
                if asked.only != "rate":
                    print(f"\n{killed_on_ray(cluster, Path(name), asked.kills)}.", flush=True)
                if asked.only != "kills":
                    print(f"\n{shards_on_ray(cluster, Path(name))}.")
            return
        print(f"# Jobs in shards ({platform.machine()}, {os.cpu_count()} cores, hflow-emoji)\n")
        for part, measure in parts.items():
            if asked.only in (None, part):
                measure(Path(name))


if __name__ == "__main__":
    main()
