"""The commands that look into latents, as typed, on a tiny run."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hflow_rt.manifest import read_manifest
from hflow_rt.runtime import explore, load
from hflow_rt.runtime.directions import load_direction
from hflow_rt.runtime.pictures import heat_colours, to_uint8

Command = Callable[..., Any]
R, CELL = 16, 98  # a cell is 16 pixels enlarged 6 times and a line of 2
COMMANDS = (
    "walk",
    "heatmap",
    "zeroing",
    "seeds",
    "mix",
    "neighbours",
    "attribute",
    "attribute make",
    "attribute apply",
)
NAMES = ["end0", "end1", "z1", "z0"]


def ok(result: Any) -> Any:
    assert result.code == 0, result.err
    return result


def refused(result: Any, *parts: str) -> None:
    assert result.code == 1, result.out + result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert all(part in last for part in parts), last
    assert "Traceback" not in result.err


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def cell(picture: np.ndarray, column: int, top: int = 0, left: int = 0) -> np.ndarray:
    """The image in a cell, at its own 16 x 16 pixels."""
    start = left + 2 + column * CELL
    return picture[top + 2 : top + 98 : 6, start : start + 96 : 6]


def label_width(picture: np.ndarray, columns: int) -> int:
    return picture.shape[1] - (columns * CELL + 2)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for values between two levels, which another batch may round the other way."""
    return bool(np.abs(a.astype(int) - b.astype(int)).max() <= 1)


@pytest.fixture
def sets(photo: Command) -> None:
    """Two folders, `bright` and `dark`."""
    for index in range(4):
        for name, change in (("bright", lambda p: 128 + p // 2), ("dark", lambda p: p // 2)):
            path = photo(f"{name}/{index}.png")
            Image.fromarray(change(pixels(path))).save(path)


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(hflow: Command, command: str) -> None:
    text = ok(hflow(*command.split(), "--help")).out
    assert re.search(rf"Example: hflow-rt {command}\b", text)


def test_help_has_a_panel_for_them(hflow: Command) -> None:
    text = ok(hflow("--help")).out
    panel = text.partition(" Latents ")[2]
    assert all(re.search(rf"^\W*{command.split()[0]}\b", panel, re.MULTILINE) for command in COMMANDS)


def test_none_of_them_needs_torch(python: Command, run: Path, sets: None) -> None:
    code = """
import sys
from hflow_rt.cli.__main__ import main
for command in sys.argv[1].split(";"):
    sys.argv = ["hflow-rt", *command.split()]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, command
print("imported:", sorted({"torch", "onnx", "triton", "av", "accelerate"} & sys.modules.keys()))
"""
    commands = (
        "walk --keyframes 2 --frames 2 -o walk.gif", "heatmap --draws 2", "zeroing --samples -n 1", "seeds 0-2",
        "mix --rows 0 --columns 1", "neighbours --samples 1 --data dark", "attribute make bright dark",
        "attribute apply attribute.safetensors -n 1",
    )  # fmt: skip
    assert ok(python(code, ";".join(commands))).out.endswith("imported: []\n")


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
        [[explore.heat_map(session, explore.select(latents, i), name, 5, std=0.8) for name in NAMES] for i in (0, 1)]
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
    latents = explore.latents_of_seeds(session, [0, 1, 2, 3])
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


def test_neighbours_of_samples_in_a_part_of_the_data(hflow: Command, run: Path, photo: Command) -> None:
    for name in ("train/a", "train/b", "test/c"):
        photo(f"photos/{name}.png")
    words = ["neighbours", "--samples", 2, "--seed", 3, "--data", "photos", "--part", "train", "-k", 9]
    result = ok(hflow(*words))
    assert "of 2 images, 2 nearest in u1 and in pixels to each of 2: neighbours.png\nnext: hflow-rt" in result.out
    report = json.loads(ok(hflow(*words, "--json", "-b", "torch")).out)
    assert {hit["image"] for hit in report["nearest"][1]["u1"]} == {"train/a.png", "train/b.png"}
    picture = pixels("neighbours.png")
    assert close(cell(picture, 0, 0, label_width(picture, 3)), to_uint8(load(run).sample(1, 0.7, seed=3))[0])


# attribute


def test_attribute_found_and_added(hflow: Command, run: Path, sets: None, photo: Command) -> None:
    result = ok(hflow("attribute", "make", "bright", "dark", "-o", "light.safetensors"))
    assert "4 images of bright against 4 of dark, in u1: light.safetensors\nlength " in result.out
    assert "next: hflow-rt attribute apply light.safetensors --gain -2:2:5" in result.out
    about = load_direction("light.safetensors").about
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


def test_a_direction_of_another_model(hflow: Command, run: Path, sets: None) -> None:
    ok(hflow("attribute", "make", "bright", "dark"))
    manifest = run / "bundle" / "manifest.json"
    described = json.loads(manifest.read_text())
    described["checkpoint"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(described))
    refused(hflow("attribute", "apply", "attribute.safetensors"), "attribute.safetensors is of another model (weights ")


# bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("walk -o walk.avi", "an animation must end in .gif, .webp, .mp4, .png; found 'walk.avi'"),
        ("walk --fps 0", ".webp needs 0.1 .. 240 frames per second; found 0.0"),
        ("walk --rows 0", "at least 1 row and 1 column, not 0 and 3"),
        ("walk --keyframes 1", "at least 2 keyframes and 1 frame per segment; found 1 and 24"),
        ("walk --fix u1", "unknown latent 'u1'; choose among end0, end1, z1, z0"),
        ("walk --space w", "unknown space 'w' for this hflow model; known: z, y0"),
        ("walk --mode cubic", "interpolation mode must be one of lerp, slerp; found 'cubic'"),
        ("heatmap -o a.txt", "a picture's name must end in"),
        ("heatmap --draws 1", "at least 2 redraws, not 1"),
        ("heatmap --redraw-std 0", "std must be a finite number > 0; found '0.0'"),
        ("heatmap -n 0", "number of images must be at least 1, not 0"),
        ("heatmap a.png --std 1", "--std is for samples"),
        ("heatmap nowhere.png", "no image at nowhere.png"),
        ("zeroing -n 0", "number of images must be at least 1, not 0"),
        ("zeroing --samples -n 0", "number of images must be at least 1, not 0"),
        ("zeroing a.png --samples", "images and --samples both say what to start from"),
        ("zeroing --std 1", "--std is for samples; ask for them with --samples"),
        ("seeds 5-2", "a range of seeds goes up; found '5-2'; write 2-5"),
        ("seeds x", "numbers and ranges such as 7 or 0-15; found 'x'"),
        ("seeds 18446744073709551616", "seed must be in 0 .. 2^64 - 1"),
        ("seeds --columns 0", "at least 1 column, not 0"),
        ("mix --rows x", "found 'x'"),
        ("mix --cut u1", "unknown latent 'u1'; choose among end0, end1, z1, z0"),
        ("mix --from-rows u1", "unknown latent 'u1'; choose among end0, end1, z1, z0"),
        ("mix --cut z1 --from-rows z0", "--cut and --from-rows both say what the rows give"),
        ("mix --rows 0 --row-images a.png", "--rows and --row-images both say what the rows are"),
        ("neighbours --samples 0", "number of images must be at least 1, not 0"),
        ("neighbours -k 0", "number of neighbours must be at least 1, not 0"),
        ("neighbours --in w", "nothing is called 'w' in this model; choose among end0, end1, z1, z0, u0, u1"),
        ("neighbours --part half", "must be one of all, train, test; found 'half'"),
        ("neighbours --data nowhere", "no images at nowhere"),
        ("neighbours a.png --std 1", "--std is for samples"),
        ("attribute make nowhere dark", "no image at nowhere"),
        ("attribute make bright bright", "the two sets need different means and different images within them"),
        ("attribute make bright dark --in w", "nothing is called 'w'"),
        ("attribute make bright dark -o a.png", "a direction's name must end in .safetensors; found 'a.png'"),
        ("attribute make bright/0.png dark", "at least 2 images on each side; bright/0.png has 1"),
        ("attribute apply nowhere.safetensors", "no direction at nowhere.safetensors"),
        ("attribute apply runs/tiny/model.safetensors", "runs/tiny/model.safetensors holds no direction"),
        ("attribute apply a.safetensors --gain x", "a gain is a number, or FROM:TO:COUNT such as -2:2:5; found 'x'"),
    ],
)
def test_bad_input_is_one_line(hflow: Command, run: Path, photo: Command, sets: None, words: str, message: str) -> None:
    photo("a.png")
    before = sorted(Path().rglob("*"))
    refused(hflow(*words.split()), message)
    assert sorted(Path().rglob("*")) == before


def test_a_model_larger_than_what_ships(hflow: Command, run: Path) -> None:
    manifest = run / "bundle" / "manifest.json"
    described = json.loads(manifest.read_text())
    described["resolution"] = 256
    manifest.write_text(json.dumps(described))
    for command in ("zeroing", "neighbours"):
        refused(hflow(command), "the images that ship are smaller than 256x256; name others")


@pytest.mark.parametrize("command", ["walk", "heatmap", "zeroing", "seeds", "mix", "neighbours"])
def test_without_an_exported_model(hflow: Command, run: Path, command: str) -> None:
    shutil.rmtree(run / "bundle")
    refused(hflow(command), "has no exported bundle")
