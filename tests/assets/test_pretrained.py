"""The bundled models are whole, small, proved, and what their cards say."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from hflow_rt.assets import bundled_models, demo_images, pretrained
from hflow_rt.data.dataset import open_dataset
from hflow_rt.errors import BundleError
from hflow_rt.models.checkpoint import load_model
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle

FLOW = pretrained("hflow-emoji")
CARD = FLOW.with_suffix(".md")

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", bundled_models())
def test_the_bundle_is_whole_and_verified(name: str) -> None:
    folder = pretrained(name)
    bundle = find_bundle(folder)
    for file in bundle.manifest.files:
        assert bundle.file(file).is_file()
    assert {path.name for path in folder.iterdir()} == {*bundle.manifest.files, "manifest.json"}
    assert bundle.manifest.verified
    assert bundle.manifest.checkpoint["weights"] == "float16"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 9e6
    text = (folder / "manifest.json").read_text() + folder.with_suffix(".md").read_text()
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


def test_all_together_are_small() -> None:
    assert sum(path.stat().st_size for name in bundled_models() for path in pretrained(name).iterdir()) <= 40e6


def test_graphs_read_their_weights_from_the_model_file(tmp_path: Path) -> None:
    bundle = find_bundle(shutil.copytree(pretrained("glow-emoji"), tmp_path / "glow"))
    assert {graph.weights for graph in bundle.manifest.graphs.values()} == {("model.safetensors", "weights.bin")}
    with open(bundle.model, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(BundleError, match=r"model\.safetensors was changed after export"):
        load(bundle.path, device="cpu").sample(1)


def test_cards_and_table_are_of_the_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python docs/make_cards.py` writes them."""
    monkeypatch.syspath_prepend(str(DOCS))
    make_cards = pytest.importorskip("make_cards")
    monkeypatch.delitem(sys.modules, "make_cards")
    for name in bundled_models():
        assert pretrained(name).with_suffix(".md").read_text() == make_cards.card(name)
    page = (DOCS / "models.md").read_text()
    assert page == make_cards.tabled(page)
    assert all(f"\n| [`{name}`]" in page for name in bundled_models())


def test_images_come_back_exactly() -> None:
    session, images = load(FLOW, "onnx", "cpu"), open_dataset(demo_images(), 64)
    pixels = images.pixels(images.split()[1][:4])
    again = session.forward(session.inverse(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))).latents)
    assert (np.rint(again * 255) == pixels).all()


@pytest.mark.slow
def test_the_card_gives_its_bits_per_dimension() -> None:
    """On all test images, which ship; the figure of the card is one draw, at the seed of `eval bpd`."""
    from hflow_rt.evaluation.bits import bits_figures

    images = open_dataset(demo_images(), 64)
    held_out = images.split()[1]
    figures = bits_figures(load_model(FLOW / "model.safetensors"), images.pixels(held_out), 0).figures
    found = figures["strict"].estimate
    said = re.search(r"\| strict bound, bits/dim, (\d+) test images \| ([\d.]+) ± ([\d.]+) \|", CARD.read_text())
    assert said, "the card has no line of the strict bound"
    assert int(said[1]) == len(held_out) == found.n
    assert float(said[2]) == pytest.approx(found.mean, abs=2e-3)
    assert float(said[3]) == pytest.approx(found.standard_error, abs=1e-3)
