"""What fewer steps of ihdm-emoji cost: docs/images/ihdm/steps.webp, and the figures of the table in docs/ihdm.md.

    OMP_NUM_THREADS=1 python docs/compare_steps.py fluent64.zip

Distances are of 7x7 patches to those of 512 training images, sorted along 128 random lines, root mean square in 8-bit
levels; the last line is of as many other training images as there are samples.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hflow_rt
from hflow_rt.data.selection import select
from hflow_rt.runtime.images.pictures import Row, save_image, table, to_uint8

PICTURE = Path(__file__).parent / "images" / "ihdm" / "steps.webp"
SHARES, SAMPLES, SHOWN = (1, 2, 3, 5), 24, 8
DATA, PATCH, LINES, PATCHES = 512, 7, 128, 40_000

Array = NDArray[np.float64]


def patches(images: NDArray[np.uint8], seed: int) -> Array:
    """Patches at random places of images `[n, R, R, 3]`, `[PATCHES, 3 PATCH^2]`."""
    random = np.random.default_rng(seed)
    last = images.shape[1] - PATCH + 1
    places = zip(random.integers(len(images), size=PATCHES), *random.integers(last, size=(2, PATCHES)), strict=True)
    return np.stack([images[n, y : y + PATCH, x : x + PATCH].reshape(-1) for n, y, x in places]).astype(float)


def distance(some: Array, others: Array) -> float:
    """Root mean square along random lines."""
    lines = np.random.default_rng(0).normal(size=(some.shape[1], LINES))
    lines /= np.linalg.norm(lines, axis=0)
    return float(np.sqrt(np.square(np.sort(some @ lines, 0) - np.sort(others @ lines, 0)).mean()))


def main(data: Path) -> None:
    """Draw, write the picture and print the figures."""
    session = hflow_rt.load("ihdm-emoji", device="cpu")
    chosen = select(data, session.resolution, "train")
    every = len(chosen.indices) // (DATA + SAMPLES)
    known = chosen.pixels(np.arange(DATA + SAMPLES) * every).transpose(0, 2, 3, 1)
    aim, rows = patches(known[:DATA], 1), list[Row]()
    for share in SHARES:
        fewer = session.in_steps(session.steps // share)
        began = time.process_time()
        images = to_uint8(fewer.sample(SAMPLES, seed=1))
        seconds = (time.process_time() - began) / SAMPLES
        rows.append(Row(images[:SHOWN], f"{fewer.steps} steps"))
        apart = distance(patches(images, 2), aim)
        print(f"{fewer.steps} steps: {seconds:.2f} CPU seconds an image, distance {apart:.1f}")
    print(f"other images: {distance(patches(known[DATA:], 2), aim):.1f}")
    save_image(PICTURE, table(rows, scale=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the zip of emoji")
    main(parser.parse_args().data)
