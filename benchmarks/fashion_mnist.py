"""Strict bits per dimension of several presets on the 10,000 test images of Fashion-MNIST, after equal time.

A minute is one of the time that the process spends computing, so that models compare although other processes take
their turns: set OMP_NUM_THREADS=1, else two threads use it up twice as fast.

    python benchmarks/fashion_mnist.py [--minutes 10] [--work DIR] [--out FILE.md]

The images are those of Debian's package `dataset-fashion-mnist`, which apt fetches; where it cannot, the reason is said
and nothing is measured. They are padded from 28 to 32 pixels and grey in all three channels, so figures compare the
models of this table with each other and not with those of other papers.
"""

import argparse
import gzip
import io
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PACKAGE = "dataset-fashion-mnist"
FILES = Path("usr/share/datasets/fashion-mnist")
CLASSES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PARTS = {"train": "train", "test": "t10k"}


class Skipped(Exception):  # noqa: N818 - no error
    """Why nothing can be measured here."""


def fetch(work: Path) -> Path:
    """The folder with the package's files, unpacked below `work` if the package is not installed."""
    for root in (Path("/"), work):
        if (root / FILES).is_dir():
            return root / FILES
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Skipped(f"there is no {tool} here, and {PACKAGE} is a Debian package")
    done = subprocess.run(["apt-get", "download", PACKAGE], cwd=work, capture_output=True, text=True, check=False)
    archives = sorted(work.glob(f"{PACKAGE}_*.deb"))
    if done.returncode or not archives:
        reason = (done.stderr.strip() or "no file came").splitlines()[-1]
        raise Skipped(f"apt-get cannot download {PACKAGE}: {reason}")
    subprocess.run(["dpkg-deb", "-x", archives[-1], work], check=True)
    return work / FILES


def read(folder: Path, part: str, what: str) -> NDArray[np.uint8]:
    """An array of the IDX format: a magic number, its dimensions as big-endian integers, bytes."""
    name = f"{PARTS[part]}-{what}-idx{3 if what == 'images' else 1}-ubyte.gz"
    data = gzip.decompress((folder / name).read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def dataset(work: Path) -> Path:
    """`fashion.npy` with names such as `train/boot/00012.png`, made once."""
    from hflow_rt.data.dataset import build_dataset

    output = work / "fashion.npy"
    if output.exists():
        return output
    folder, archive = fetch(work), work / "fashion.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for part in PARTS:
            images = np.pad(read(folder, part, "images"), ((0, 0), (2, 2), (2, 2)))
            for index, (image, label) in enumerate(zip(images, read(folder, part, "labels"), strict=True)):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, format="png", compress_level=1)
                file.writestr(f"{part}/{CLASSES[label]}/{index:05d}.png", buffer.getvalue())
    build_dataset(archive, output, 32, strict=True)
    archive.unlink()
    return output


def bits_per_dim(preset: str, data: Path, work: Path, minutes: float, limit: int | None, device: str) -> dict[str, Any]:
    """Train a preset and evaluate its average on test images."""
    from hflow_rt.data.dataset import open_dataset
    from hflow_rt.data.selection import select
    from hflow_rt.evaluation.bits import bits_per_dim, open_reference
    from hflow_rt.training.config import load_config
    from hflow_rt.training.log import Progress
    from hflow_rt.training.trainer import train

    # Rates as the preset starts with, and no steps down, for its images are those of another dataset; an average over
    # about 500 steps instead. What a preset spreads over its run is spread over the images that a short trial says it
    # will see. The test images are for the end; while training, a few of them tell that it goes well.
    never = 1_000_000_000
    changes = {"ema_weight": 0.002, "evaluate_images": 64}
    if load_config(preset).training.decay == "steps":
        changes["decay_every_images"] = never

    def trained(images: int, minutes: float, name: str) -> tuple[Path, list[tuple[float, int]]]:
        """A run of so many images, or as many as the minutes allow; seconds and images at the end of every step."""
        settings = [f"training.{key}={value}" for key, value in {**changes, "images": images}.items()]
        run, started = work / f"{preset}-{name}", time.process_time()
        steps = []

        def stop_in_time(progress: Progress) -> None:
            steps.append((time.process_time() - started, progress.images))
            if steps[-1][0] >= 60 * minutes:
                signal.raise_signal(signal.SIGINT)  # as somebody who has waited long enough does

        train(
            load_config(preset, overrides=settings),
            open_dataset(data, 32),
            run,
            device=device,
            on_progress=stop_in_time,
        )
        return run, steps

    now = time.strftime("%Y%m%d-%H%M%S")
    _, trial = trained(never, minutes / 20, f"trial-{now}")
    (begun, first), (ended, last) = trial[0], trial[-1]
    will_see = last + (60 * minutes - ended) * (last - first) / (ended - begun)
    run, steps = trained(round(will_see), minutes, now)
    seconds, images = steps[-1]
    model = open_reference(run / "model.safetensors", "cuda" if device == "cuda" else "cpu")
    found = bits_per_dim(model, select(data, 32, "test", limit), batch=100)
    strict = next(name for name, bound in found.claims.items() if bound.claim != "published")
    assert strict in found.bounds, found.reasons
    total = found.bounds[strict].total
    return {
        "preset": preset,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "images": images,
        "bound": found.claims[strict].title,
        "bits": f"{total.mean:.3f} ± {total.standard_error:.3f}",
        "test": total.n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of training, each")
    parser.add_argument("--presets", nargs="+", default=["nvae-demo", "glow-demo", "hflow-demo", "ihdm-demo"])
    parser.add_argument("--work", type=Path, default=Path("runs/fashion-mnist"), help="where everything is kept")
    parser.add_argument("--limit", type=int, help="so many test images instead of all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        data = dataset(given.work)
    except Skipped as reason:
        print(f"skipped: {reason}", file=sys.stderr)
        return
    lines = [
        "| preset | parameters | seconds of training | images seen | bound | bits/dim | test images |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for preset in given.presets:
        row = bits_per_dim(preset, data, given.work, given.minutes, given.limit, given.device)
        lines.append(
            f"| `{row['preset']}`, {given.device} | {row['parameters']:,} | {row['seconds']:.0f} "
            f"| {row['images']:,} | {row['bound']} | {row['bits']} | {row['test']:,} |"
        )
        print(lines[-1], file=sys.stderr)
    table = "\n".join(lines)
    print(table)
    if given.out is not None:
        given.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
