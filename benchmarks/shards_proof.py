"""Jobs in shards, proved and measured: workers killed at random, memory by number of images, processes against one.

python benchmarks/shards_proof.py [--kills 100] > benchmarks/results/shards.md
python benchmarks/shards_proof.py --ray [--kills 100] >> benchmarks/results/shards.md
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from ray_loopback import Loopback, on_loopback

COMMAND = [sys.executable, "-m", "hflow_rt.cli"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def job(out: Path, images: int, shards: int, *more: str) -> list[str]:
    """A job of samples of the bundled model."""
    return [*COMMAND, "sample", "-n", str(images), "--shards", str(shards), "--format", "npz", "-o", str(out), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(folder: Path, kills: int) -> str:
    """Two workers at one job, both killed at random, run again until that has been so often; every byte compared."""
    rng, images, shards = np.random.default_rng(0), 600, 150
    subprocess.run(job(folder / "whole", images, shards), check=True, cwd=folder, env=ONE_THREAD, **QUIET)
    whole, done, rounds = contents(folder / "whole"), 0, 0
    while done < kills:
        rounds += 1
        out = folder / f"broken-{rounds}"
        while done < kills:
            workers = [
                subprocess.Popen(job(out, images, shards), cwd=folder, env=ONE_THREAD, **QUIET) for _ in range(2)
            ]
            time.sleep(float(rng.uniform(0.5, 3.0)))
            alive = sum(worker.poll() is None for worker in workers)
            for worker in workers:
                worker.send_signal(signal.SIGKILL)
                worker.wait()
            done += alive
            if not alive:
                break  # the job is done; another one
        subprocess.run(job(out, images, shards), check=True, cwd=folder, env=ONE_THREAD, **QUIET)
        found = contents(out)
        if found != whole:
            different = [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]
            return f"DIFFERENT after {done} kills: {different[:5]}"
    return (
        f"{done} workers of {rounds} jobs of {shards} shards killed at random (SIGKILL), each job then run to its end:"
        f" {len(whole)} files, every byte as in the undisturbed one, none left over"
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


def rate(folder: Path, name: str, images: int, *more: str) -> float:
    began = time.monotonic()
    subprocess.run(job(folder / name, images, 16, *more), check=True, cwd=folder, env=ONE_THREAD, **QUIET)
    return images / (time.monotonic() - began)


def measured(folder: Path) -> None:
    """Memory by number of images, and what two processes are worth."""
    print("| samples, 16 shards, one process | peak MiB |\n|---:|---:|")
    for images in (100, 400, 1600, 6400):
        print(f"| {images:,} | {peak(job(folder / f'm{images}', images, 16), folder):.0f} |", flush=True)
    ones, twos = [], []
    for round_ in range(3):
        ones.append(rate(folder, f"one{round_}", 3200))
        twos.append(rate(folder, f"two{round_}", 3200, "--processes", "2"))
    one, two = np.median(ones), np.median(twos)
    print(f"\nOne process {one:.0f} images/s, two {two:.0f}: {two / one / 2:.2f} of twice as many, start included.")


def there(out: Path) -> int:
    """Shards that are done."""
    return len([*out.glob("*.npz.json")])


def killed_on_ray(cluster: Loopback, folder: Path, kills: int) -> str:
    """As `killed`, of the workers, the second machine and the driver of a cluster; every job is run to its end."""
    rng, images, shards = np.random.default_rng(0), 600, 150
    subprocess.run(job(folder / "whole", images, shards), check=True, cwd=folder, env=ONE_THREAD, **QUIET)
    whole, jobs, runs = contents(folder / "whole"), 0, 0
    done = dict.fromkeys(("workers", "machines", "drivers"), 0)
    while sum(done.values()) < kills:
        jobs += 1
        out = folder / f"broken-{jobs}"
        command = job(out, images, shards, "--ray", cluster.address)
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
            command = job(folder / f"cost{name}{shards}", shards, shards, *more)
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
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only-kills", action="store_true")
    parser.add_argument("--ray", action="store_true", help="the part that is of Ray")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.ray:
            with on_loopback(), closing(Loopback(1)) as cluster:
                print(f"\n{killed_on_ray(cluster, folder, asked.kills)}.", flush=True)
                if not asked.only_kills:
                    print(f"\n{shards_on_ray(cluster, folder)}.")
            return
        print(f"# Jobs in shards ({platform.machine()}, {os.cpu_count()} cores, the bundled model)\n")
        if not asked.only_kills:
            measured(folder)
        print(f"\n{killed(folder, asked.kills)}.")


if __name__ == "__main__":
    main()
