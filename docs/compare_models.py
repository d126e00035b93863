"""Set the bundled models side by side: pictures in docs/images/models/, and how fast each is in docs/cards/rates.json.

    OMP_NUM_THREADS=1 python docs/compare_models.py fluent64.zip
    python docs/make_cards.py

The pictures are of seeds 0 to 7, image 0 of each, whatever came out; below them is what is most like each of them among
the training images, by the cosine of features of EfficientNet-lite0. The rates are medians of three turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hflow_rt
from hflow_rt import Session
from hflow_rt.assets import bundled_models
from hflow_rt.data.selection import Selection, select
from hflow_rt.evaluation.cache import FeatureCache, cache_folder
from hflow_rt.evaluation.distance import data_statistics
from hflow_rt.evaluation.features import EFFICIENTNET, FeatureNetwork, open_features
from hflow_rt.runtime.images.pictures import Row, save_image, table, to_uint8

DOCS = Path(__file__).parent
PICTURES = DOCS / "images" / "models"
RATES = DOCS / "cards" / "rates.json"
SEEDS = range(8)
TURNS = 3

Pixels = NDArray[np.uint8]


def directions(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1."""
    found: NDArray[np.float32] = features / np.linalg.norm(features, axis=1, keepdims=True)
    return found


def nearest(network: FeatureNetwork, data: Selection, known: NDArray[np.float32], images: Pixels) -> Row:
    """The training image that is most like each of `images` `[n, R, R, 3]`, with the cosine under it."""
    cosines = directions(network(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))) @ known.T
    found = data.pixels(cosines.argmax(1)).transpose(0, 2, 3, 1)
    return Row(found, "nearest", [f"{value:.2f}" for value in cosines.max(1)])


def pictures(sessions: dict[str, Session], data: Selection) -> None:
    """samples.png, and nearest.png, which also has training images."""
    network = open_features(EFFICIENTNET, data.images.resolution)
    found = data_statistics(network, data, cache=FeatureCache(cache_folder()))
    assert found is not None
    known = directions(found.rows)
    rows, pairs = [], []
    for name, session in sessions.items():
        images = to_uint8(np.concatenate([session.sample(1, seed=seed) for seed in SEEDS]))
        rows.append(Row(images, name))
        pairs += [rows[-1], nearest(network, data, known, images)]
    PICTURES.mkdir(exist_ok=True)
    save_image(PICTURES / "samples.png", table(rows, scale=1))
    save_image(PICTURES / "nearest.png", table(pairs, scale=1))


def rate(images: int, run: Callable[[], object]) -> float:
    """Images a second."""
    began = time.perf_counter()
    run()
    return images / (time.perf_counter() - began)


def rates(sessions: dict[str, Session], data: Selection) -> dict[str, dict[str, float]]:
    """Images a second that each samples and encodes, in calls of 16, or of 2 where an image takes many steps."""
    found: dict[str, dict[str, list[float]]] = {name: {"sample": [], "inverse": []} for name in sessions}
    for turn in range(TURNS):
        for name, session in sessions.items():
            count = 16 if session.steps == 1 else 2
            found[name]["sample"].append(rate(count, lambda: session.sample(count, seed=turn)))  # noqa: B023
            if session.can("inverse"):
                images = data.pixels(range(count)).astype(np.float32) / 255
                found[name]["inverse"].append(rate(count, lambda: session.inverse(images)))  # noqa: B023
    return {
        name: {what: float(f"{statistics.median(values):.2g}") for what, values in both.items() if values}
        for name, both in found.items()
    }


def main() -> None:
    """Open all, draw, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="the images that all were trained on")
    data = select(parser.parse_args().images, 64, "train")
    sessions = {name: hflow_rt.load(name, device="cpu") for name in bundled_models()}
    pictures(sessions, data)
    RATES.write_text(json.dumps(rates(sessions, data), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
