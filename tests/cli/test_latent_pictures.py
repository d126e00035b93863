"""Walks, heat maps, zeroed latents, seeds and mixed styles, as typed, on a tiny run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latent_cells import CELL, NAMES, R, cell, close, label_width
from outcomes import ok, pixels
from PIL import Image

from hflow_rt.manifest import BundledFile, Graph, Latent, Manifest, Tensor
from hflow_rt.runtime import Session, load
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.engines.engine import Engine
from hflow_rt.runtime.images.pictures import heat_colours, to_uint8
from hflow_rt.runtime.latents import latent_views as views

Command = Callable[..., Any]


# walk


def test_walk_writes_a_contact_sheet(hflow: Command, run: Path) -> None:
    words = "walk --rows 1 --columns 2 --keyframes 3 --frames 4 --seed 3 -o walk.png"
    result = ok(hflow(*words.split()))
    assert "12 frames of 2 walks (slerp in z): walk.png\nnext: hflow-rt walk --fix end0" in result.out
    sheet = pixels("walk.png")
    frame = 2 * CELL + 2
    assert sheet.shape == (3 * (CELL + 4) + 2, 4 * (frame + 2) + 2, 3)
    images = to_uint8(load(run).sample(6, 0.7, seed=3))
    for key in range(3):
        for path in range(2):
            assert close(cell(sheet, path, 2 + key * (CELL + 4), 2), images[3 * path + key])


@pytest.mark.parametrize(("name", "format_"), [("walk.gif", "GIF"), ("walk.webp", "WEBP")])
def test_walk_writes_a_loop(hflow: Command, run: Path, name: str, format_: str) -> None:
    words = f"walk --rows 2 --columns 2 --keyframes 2 --frames 3 --space y0 --mode lerp --fix u1 --json -o {name}"
    report = json.loads(ok(hflow(*words.split())).out)
    assert report == {
        "output": name, "frames": 6, "paths": 4, "keyframes": 2, "closed": True, "mode": "lerp", "space": "y0",
        "fixed": ["u1"], "seed": 0,
    }  # fmt: skip
    with Image.open(name) as image:
        assert image.format == format_
        assert image.n_frames == 6
        assert image.size == (2 * CELL + 2, 2 * CELL + 2)


def test_walk_writes_mp4_and_may_stay_open(hflow: Command, run: Path) -> None:
    av = pytest.importorskip("av", reason="mp4 needs the extra 'video'")
    ok(hflow("walk", "--open", "--rows", 1, "--columns", 1, "--keyframes", 2, "--frames", 3, "-o", "walk.mp4"))
    with av.open("walk.mp4") as video:
        assert len(list(video.decode(video=0))) == 4


# heatmap


def test_heatmap_colours_what_each_latent_changes(hflow: Command, run: Path) -> None:
    report = json.loads(ok(hflow("heatmap", "-n", 2, "--draws", 5, "--redraw-std", 0.8, "--json")).out)
    session = load(run)
    latents = next(session.draw([0, 1], 0.7))
    maps = np.array(
        [
            [views.heat_map(session, views.select(latents, base), name, 5, std=0.8, first=2) for name in NAMES]
            for base in (0, 1)
        ]
    )
    assert report["output"] == "heatmap.png"
    assert report["largest_std"] == pytest.approx(maps.max(), abs=1e-4)
    for index, entry in enumerate(report["maps"]):
        assert entry["image"] == f"sample {index}"
        assert list(entry["mean_std"]) == NAMES
        np.testing.assert_allclose(list(entry["mean_std"].values()), maps[index].mean((1, 2)), atol=1e-4)
    picture = pixels("heatmap.png")
    second = picture.shape[0] // 2
    for index, top in enumerate((0, second)):
        assert close(cell(picture, 0, top), to_uint8(session.forward(latents))[index])
        for column, colours in enumerate(heat_colours(maps[index] / maps.max())):
            assert np.abs(cell(picture, 1 + column, top).astype(int) - colours).max() <= 3
    np.testing.assert_array_equal(cell(picture, 5)[[0, -1], 0], heat_colours(np.array([1.0, 0.0])))


def test_no_base_of_a_heatmap_is_its_own_redraw(hflow: Command, run: Path) -> None:
    report = json.loads(ok(hflow("heatmap", "-n", 3, "--draws", 2, "--std", 1, "--json")).out)
    session = load(run)
    drawn = next(session.draw(range(5), 1.0))
    for base, entry in enumerate(report["maps"]):
        for name in NAMES:  # redrawn as in images 3 and 4, the first two after the bases
            redrawn = {n: values[[3, 4] if n == name else [base, base]] for n, values in drawn.items()}
            expected = session.forward(redrawn).std(0).mean()
            assert entry["mean_std"][name] == pytest.approx(expected, abs=1e-4)
            assert expected > 1e-3


def test_heatmap_of_an_image(hflow: Command, run: Path, photo: Command) -> None:
    path = photo("deep/a.png")
    result = ok(hflow("heatmap", path, "--draws", 2, "-b", "torch"))
    assert re.search(r"^z0: mean std 0\.\d{4} \(pixels in 0 \.\. 1\)$", result.out, re.MULTILINE)
    assert "1 x 4 maps of 2 redraws" in result.out
    np.testing.assert_array_equal(cell(pixels("heatmap.png"), 0), pixels(path))


# zeroing


def test_zeroing_of_images(hflow: Command, run: Path, photo: Command) -> None:
    paths = [photo(f"photos/{name}.png") for name in "abc"]
    report = json.loads(ok(hflow("zeroing", "photos", "-n", 2, "--json")).out)
    assert report["images"] == ["a.png", "b.png"]
    labels = ["original", "-z0", "-z0 z1", "-z0 z1 end1", "all zero (mean image)"]
    assert list(report["rms_change"]) == labels
    assert report["rms_change"]["original"] < 1e-4 < report["rms_change"]["-z0"]
    picture = pixels("zeroing.png")
    assert picture.shape[0] == len(labels) * 100
    left = label_width(picture, 2)
    for index in range(2):
        np.testing.assert_array_equal(cell(picture, index, 0, left), pixels(paths[index]))
    assert close(cell(picture, 0, 400, left), cell(picture, 1, 400, left))  # the mean image knows no image


def test_zeroing_of_what_ships_and_of_samples(hflow: Command, run: Path) -> None:
    report = json.loads(ok(hflow("zeroing", "-n", 3, "--json")).out)
    assert len(report["images"]) == 3
    assert all(name.startswith("test/") for name in report["images"])
    assert "2 images: zeroing.png\nnext: " in ok(hflow("zeroing", "--samples", "-n", 2, "--seed", 4)).out
    picture = pixels("zeroing.png")
    images = to_uint8(load(run).sample(2, 0.7, seed=4))
    assert close(cell(picture, 1, 0, label_width(picture, 2)), images[1])


# seeds


def test_each_cell_of_seeds_is_the_sample_of_that_seed(hflow: Command, run: Path) -> None:
    result = ok(hflow("seeds", "0-2", 20, 31, "--columns", 3, "--std", 0.5))
    assert "5 seeds at std 0.5: seeds.png\nnext: hflow-rt sample --seed 31 -n 1 --std 0.5" in result.out
    picture = pixels("seeds.png")
    second = picture.shape[0] // 2
    assert second > CELL + 10  # room for the caption
    for index, seed in enumerate((0, 1, 2, 20, 31)):
        ok(hflow("sample", "--seed", seed, "--first", 0, "-n", 1, "--std", 0.5, "-o", "one"))
        assert close(cell(picture, index % 3, index // 3 * second), pixels("one/000000.png"))
    report = json.loads(ok(hflow("seeds", "--json")).out)
    assert report == {"output": "seeds.png", "seeds": list(range(16)), "std": ["0.7"]}


# mix


def test_mix_of_seeds(hflow: Command, run: Path) -> None:
    report = json.loads(ok(hflow("mix", "--rows", "0-1", "--columns", "1-3", "--cut", "z1", "--json")).out)
    assert report == {
        "output": "mix.png", "rows": ["seed 0", "seed 1"], "columns": ["seed 1", "seed 2", "seed 3"],
        "from_rows": ["end0", "end1", "z1"], "from_columns": ["z0"],
    }  # fmt: skip
    picture = pixels("mix.png")
    left, session = label_width(picture, 4), load(run)
    latents = views.latents_of_seeds(session, [0, 1, 2, 3])
    images = to_uint8(session.forward(latents))
    assert (picture[:98, left : left + 98] == 255).all()
    below = picture.shape[0] - 200
    for column in range(3):
        assert close(cell(picture, 1 + column, 0, left), images[1 + column])
    for row in range(2):
        top = below + 100 * row
        assert close(cell(picture, 0, top, left), images[row])
        for column in range(3):
            mixed = {n: v[[1 + column]] if n == "z0" else v[[row]] for n, v in latents.items()}
            assert close(cell(picture, 1 + column, top, left), to_uint8(session.forward(mixed))[0])
    assert close(cell(picture, 1, below + 100, left), images[1])  # seed 1 with seed 1


def test_mix_of_images(hflow: Command, run: Path, photo: Command) -> None:
    a, b = photo("a.png"), photo("b.png")
    result = ok(hflow("mix", "--row-images", a, "--column-images", a, "--column-images", b, "--from-rows", "z0"))
    assert "1 x 2 mixes, z0 of the row, end0 end1 z1 of the column: mix.png" in result.out
    picture = pixels("mix.png")
    left = label_width(picture, 3)
    np.testing.assert_array_equal(cell(picture, 1, 0, left), pixels(a))
    np.testing.assert_array_equal(cell(picture, 2, 0, left), pixels(b))
    top = picture.shape[0] - 100
    np.testing.assert_array_equal(cell(picture, 1, top, left), pixels(a))
    assert not close(cell(picture, 2, top, left), pixels(a))


class OneLatent(Engine):
    """x = 0.5 + 0.05 z."""

    backend = "toy"

    def run(self, graph: str, inputs: Any) -> list[Any]:
        return [np.clip(np.float32(0.5) + np.float32(0.05) * inputs[0], 0, 1)]

    def close(self) -> None:
        pass


def test_mix_with_a_single_latent(hflow: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(
        file="forward.onnx",
        inputs=(Tensor(name="z", shape=(3, R, R), role="latent"),),
        outputs=(Tensor(name="image", shape=(3, R, R), role="image"),),
        batch=(1, 8),
        operators={},
    )
    manifest = Manifest(
        family="toy",
        config={},
        resolution=R,
        latents=(Latent(name="z", shape=(3, R, R), prior_std=1.0),),
        routes={"forward": "forward"},
        spaces={},
        graphs={"forward": graph},
        opset=20,
        tools={},
        checkpoint={"sha256": "0" * 64},
        files={"forward.onnx": BundledFile(sha256="0" * 64, bytes=0)},
    )
    monkeypatch.chdir(tmp_path)
    bundle = Bundle(tmp_path, manifest)
    session = Session(bundle, OneLatent(bundle))
    monkeypatch.setattr("hflow_rt.cli.latents.open_session", lambda *_, **__: session)
    result = ok(hflow("mix", "--rows", 0, "--columns", "1-2"))
    assert "1 x 2 mixes, z of the row, nothing of the column: mix.png" in result.out
    assert "next: hflow-rt mix --cut z -o finer.png" in result.out
