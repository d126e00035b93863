"""Neighbours in a set of images, and attributes of two sets, as typed, on a tiny run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latent_cells import cell, close, label_width
from outcomes import ok, pixels, refused

from hflow_rt.manifest import read_manifest
from hflow_rt.runtime import load
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.attributes import load_attribute

Command = Callable[..., Any]


# neighbours


@pytest.mark.parametrize("where", ["u1", "z1"])
def test_an_image_of_the_set_is_its_own_neighbour(hflow: Command, run: Path, photo: Command, where: str) -> None:
    paths = [photo(f"photos/{index:02}.png") for index in range(20)]
    words = ["neighbours", paths[17], paths[3], "--data", "photos", "-k", 4, "--in", where, "--json"]
    report = json.loads(ok(hflow(*words)).out)
    assert (report["space"], report["in"], report["searched"]) == ("y0" if where == "u1" else "z", where, 20)
    for entry, name in zip(report["nearest"], ("17.png", "03.png"), strict=True):
        assert entry["image"] == name
        for space in (where, "pixels"):
            first, *rest = entry[space]
            assert first["image"] == name
            assert first["distance"] < 1e-4
            distances = [hit["distance"] for hit in rest]
            assert len(rest) == 3
            assert distances == sorted(distances)
            assert distances[0] > 1e-3
    stack = np.stack([pixels(path) for path in paths]) / 255
    expected = np.sqrt(((stack - stack[17]) ** 2).sum((1, 2, 3)))
    hits = report["nearest"][0]["pixels"]
    np.testing.assert_allclose([hit["distance"] for hit in hits], np.sort(expected)[:4], atol=1e-5)
    picture = pixels("neighbours.png")
    left = label_width(picture, 5)
    for column in (0, 1):
        np.testing.assert_array_equal(cell(picture, column, 0, left), pixels(paths[17]))
    second = picture.shape[0] // 4
    assert (cell(picture, 0, second, left) == 255).all()
    np.testing.assert_array_equal(cell(picture, 2, second, left), pixels(f"photos/{hits[1]['image']}"))


def test_neighbours_of_samples_in_a_split_of_the_data(hflow: Command, run: Path, photo: Command) -> None:
    for name in ("train/a", "train/b", "test/c"):
        photo(f"photos/{name}.png")
    words = ["neighbours", "--samples", 2, "--seed", 3, "--data", "photos", "--split", "train", "-k", 9]
    result = ok(hflow(*words))
    line = "of 2 training images of photos, 2 nearest in u1 and in pixels to each of 2: neighbours.png\nnext: hflow-rt"
    assert line in result.out
    report = json.loads(ok(hflow(*words, "--json", "-b", "torch")).out)
    assert (report["split"], report["searched"]) == ("train", 2)
    assert {hit["image"] for hit in report["nearest"][1]["u1"]} == {"train/a.png", "train/b.png"}
    picture = pixels("neighbours.png")
    assert close(cell(picture, 0, 0, label_width(picture, 3)), to_uint8(load(run).sample(1, 0.7, seed=3))[0])


# attribute


def test_attribute_found_and_added(hflow: Command, run: Path, sets: None, photo: Command) -> None:
    result = ok(hflow("attribute", "make", "bright", "dark", "-o", "light.safetensors"))
    assert "4 images of bright against 4 of dark, in u1: light.safetensors\nlength " in result.out
    assert "next: hflow-rt attribute apply light.safetensors --gain -2:2:5" in result.out
    about = load_attribute("light.safetensors").about
    assert about.model == read_manifest(run / "bundle").checkpoint["sha256"]
    assert (about.positive, about.negative, about.positives, about.negatives) == ("bright", "dark", 4, 4)
    report = json.loads(ok(hflow("attribute", "make", "bright", "dark", "--in", "end0", "--json")).out)
    assert (report["output"], report["space"], report["name"]) == ("attribute.safetensors", "z", "end0")

    paths = [photo("a.png"), photo("b.png")]
    words = ["attribute", "apply", "light.safetensors", *paths, "--gain", "-2:2:3", "--gain", 5]
    assert "2 images at gains -2 0 +2 +5 in u1: attribute.png" in ok(hflow(*words)).out
    picture = pixels("attribute.png")
    left, second = label_width(picture, 4), picture.shape[0] // 2
    for index, path in enumerate(paths):
        np.testing.assert_array_equal(cell(picture, 1, index * second, left), pixels(path))
        assert not close(cell(picture, 3, index * second, left), pixels(path))
    assert json.loads(ok(hflow(*words, "--json")).out) == {
        "output": "attribute.png", "images": ["a.png", "b.png"], "gains": [-2, 0, 2, 5], "in": "u1",
    }  # fmt: skip


def test_attribute_on_samples(hflow: Command, run: Path, sets: None) -> None:
    ok(hflow("attribute", "make", "bright", "dark"))
    ok(hflow("attribute", "apply", "attribute.safetensors", "-n", 2, "--seed", 5, "--gain", 0, "-o", "a.png"))
    picture = pixels("a.png")
    assert close(cell(picture, 0, 0, label_width(picture, 1)), to_uint8(load(run).sample(1, 0.7, seed=5))[0])


def test_an_attribute_of_another_model(hflow: Command, run: Path, sets: None) -> None:
    ok(hflow("attribute", "make", "bright", "dark"))
    manifest = run / "bundle" / "manifest.json"
    described = json.loads(manifest.read_text())
    described["checkpoint"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(described))
    refused(hflow("attribute", "apply", "attribute.safetensors"), "attribute.safetensors is of another model (weights ")
