"""The bundled model is whole, small, proved, and what its card says."""

import re
from pathlib import Path

import numpy as np
import pytest

from hflow_rt.assets import PRETRAINED, demo_images, pretrained
from hflow_rt.data.dataset import open_dataset
from hflow_rt.models.checkpoint import load_model
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle

CARD = pretrained().with_suffix(".md")


def test_the_bundle_is_whole_and_verified() -> None:
    bundle = find_bundle(pretrained())
    for name in bundle.manifest.files:
        assert bundle.file(name).is_file()
    assert {path.name for path in pretrained().iterdir()} == {*bundle.manifest.files, "manifest.json"}
    assert bundle.manifest.verified
    assert bundle.manifest.checkpoint["weights"] == "float16"


def test_at_most_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in pretrained().iterdir()) <= 12e6


def test_nothing_in_it_names_a_machine() -> None:
    text = (pretrained() / "manifest.json").read_text() + str(CARD.read_text())
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


def test_images_come_back_exactly() -> None:
    session, images = load(pretrained(), "onnx", "cpu"), open_dataset(demo_images(), 64)
    pixels = images.pixels(images.split()[1][:4])
    again = session.forward(session.inverse(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))).latents)
    assert (np.rint(again * 255) == pixels).all()


@pytest.mark.slow
def test_the_card_gives_its_bits_per_dimension() -> None:
    """On all test images, which ship; the figure of the card is one draw, at the seed of `eval bpd`."""
    from hflow_rt.evaluation.bits import bits_figures

    images = open_dataset(demo_images(), 64)
    held_out = images.split()[1]
    figures = bits_figures(load_model(pretrained() / "model.safetensors"), images.pixels(held_out), 0).figures
    found = figures["strict"].estimate
    said = re.search(r"\| strict bits/dim.*\((\d+)\) \| ([\d.]+) ± ([\d.]+) \|", CARD.read_text())
    assert said, "the card has no line of strict bits/dim"
    assert int(said[1]) == len(held_out) == found.n
    assert float(said[2]) == pytest.approx(found.mean, abs=2e-3)
    assert float(said[3]) == pytest.approx(found.standard_error, abs=1e-3)


def test_the_card_lies_beside_it() -> None:
    assert Path(pretrained().parent / f"{PRETRAINED}.md") == CARD
    text = CARD.read_text()
    for word in ("MIT", "FD-EffLite0", "make pretrained", "seed", "3,157"):
        assert word in text, word
