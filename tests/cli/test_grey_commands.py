"""Every command on a model of grey images: it reads colour pictures as luminance and writes grey ones."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, refused
from PIL import Image

from hflow_rt.data.selection import select
from hflow_rt.errors import DataError
from hflow_rt.evaluation.bits import bits_per_dim, open_reference
from hflow_rt.models.registry import FAMILIES, family
from hflow_rt.runtime import Session, load
from hflow_rt.runtime.images.pictures import grid, to_uint8

Command = Callable[..., Any]
R = 8


@pytest.fixture(scope="module", autouse=True)
def _grey(docs_family: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(Path(__file__).parents[1] / "models")
        patched.setitem(FAMILIES, "grey", "toy_grey")
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey run, trained on colour pictures and exported."""
    import hflow_rt

    folder = tmp_path_factory.mktemp("grey")
    pictures(folder / "photos")
    settings = {"family": "grey", **family("grey").tiny}
    run = hflow_rt.train(config=settings, data=folder / "photos", out=folder / "run", images=8, device="cpu").run
    hflow_rt.export(run, bound=True)
    return folder


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "photos").symlink_to(trained / "photos")
    return trained / "run"


def pictures(folder: Path) -> None:
    """Twelve of R x R: colour ones, a grey one, one with transparency."""
    folder.mkdir()
    values = np.random.default_rng(3).integers(0, 256, (12, R, R, 4), np.uint8)
    for index, pixels in enumerate(values):
        mode = {0: "L", 1: "RGBA"}.get(index, "RGB")
        image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels[..., : len(mode)])
        image.save(folder / f"{index:02}.png")


def session_of(run: Path) -> Session:
    return load(run, "onnx", "cpu")


def picture(path: Path | str) -> np.ndarray:
    """A grey picture as it is in its file."""
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_a_session_reads_luminance_and_writes_what_it_reads_back(here: Path) -> None:
    session = session_of(here)
    assert session.channels == 1
    assert f"grey {R}x{R} grey on" in repr(session)
    with Image.open("photos/05.png") as image:
        red, green, blue = np.asarray(image).astype(float).transpose(2, 0, 1)
    found = session.read("photos/05.png")
    assert found.shape == (1, 1, R, R)
    assert np.abs(found[0, 0] * 255 - (0.299 * red + 0.587 * green + 0.114 * blue)).max() < 0.501
    np.testing.assert_array_equal(session.read("photos")[5], found[0])  # one by one or as a set
    np.testing.assert_array_equal(np.rint(session.read("photos/00.png")[0, 0] * 255), picture("photos/00.png"))

    images = session.sample(3, std=1, seed=1)
    assert images.shape == (3, 1, R, R)
    session.save(images, "sheet.png")
    np.testing.assert_array_equal(picture("sheet.png"), np.asarray(grid(to_uint8(images))))
    session.save(images[:1], "one.png")
    np.testing.assert_array_equal(picture("one.png"), to_uint8(images)[0, ..., 0])
    np.testing.assert_array_equal(np.rint(session.read("one.png") * 255), np.rint(images[:1] * 255))
    for name in ("one.webp", "one.jpg"):
        session.save(images[:1], name)
        assert np.abs(session.read(name) - images[:1]).max() < 0.05


def test_arrays(here: Path) -> None:
    import torch

    session = session_of(here)
    images = session.read("photos")
    levels = np.rint(images * 255).astype(np.uint8)
    expected = session.inverse(images)
    for same in (levels.transpose(0, 2, 3, 1), levels[:, 0], torch.from_numpy(levels[:, 0])):
        np.testing.assert_allclose(session.inverse(same).log_prob, expected.log_prob, rtol=1e-6)
    np.testing.assert_allclose(session.forward(expected.latents), images, atol=1e-4)
    bits = -expected.log_prob / (R * R * np.log(2)) + 8
    np.testing.assert_allclose(session.bits_per_dim(expected.log_prob), bits, rtol=1e-6)


@pytest.mark.parametrize("wrong", [np.zeros((2, R, R, 3), np.uint8), np.zeros((2, 3, R, R), np.float32)])
def test_colours_in_an_array_are_refused(here: Path, wrong: np.ndarray) -> None:
    wanted = rf"float32 \[B, 1, {R}, {R}\] or uint8 \[B, {R}, {R}, 1\], not "
    with pytest.raises(DataError, match=wanted + r"\[2, [38], 8, [38]\]$"):
        session_of(here).inverse(wrong)


@pytest.mark.parametrize(
    "words",
    [
        "sample -n 5 -o out.png",
        "encode photos/02.png photos/03.png --picture out.png",
        "interpolate photos/02.png photos/03.png --frames 4 -o out.png",
        "seeds 0-3 -o out.png",
        "zeroing photos -n 2 -o out.png",
        "temperature -n 2 -o out.png",
        "mix --rows 0-1 --columns 2-3 -o out.png",
        "mix --row-images photos --columns 2-3 -o out.png",
        "neighbours photos/02.png --data photos -k 2 -o out.png",
        "walk --rows 1 --columns 2 --keyframes 2 --frames 2 -o out.png",
    ],
)
def test_pictures_are_grey(hflow: Command, here: Path, words: str) -> None:
    ok(hflow(*words.split(), *(() if words.startswith("sample") else ("--model",)), here))
    assert np.ptp(picture("out.png")) > 20


def test_an_attribute_is_applied_in_grey(hflow: Command, here: Path) -> None:
    Path("some").mkdir()
    for name in ("04.png", "05.png"):
        Path("some", name).symlink_to(Path("photos", name).resolve())
    ok(hflow("attribute", "make", "photos", "some", "--model", here))
    ok(hflow("attribute", "apply", "attribute.safetensors", "photos/02.png", "--gain", "0:1:2", "--model", here))
    assert np.ptp(picture("attribute.png")) > 20


def test_a_heatmap_is_coloured_beside_grey_pictures(hflow: Command, here: Path) -> None:
    ok(hflow("heatmap", "photos/02.png", "--draws", 3, "--model", here))
    with Image.open("heatmap.png") as image:
        assert image.mode == "RGB"
        first = np.asarray(image)[2 : 2 + 96 : 12, 2 : 2 + 96 : 12]
    np.testing.assert_array_equal(first, to_uint8(session_of(here).read("photos/02.png"))[0].repeat(3, -1))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_animations(hflow: Command, here: Path, suffix: str) -> None:
    if suffix == ".mp4":
        pytest.importorskip("av", reason="mp4 needs the extra 'video'")
    ok(hflow("interpolate", "--frames", 3, "-o", f"a{suffix}", "--model", here))
    assert Path(f"a{suffix}").stat().st_size > 100


def test_what_is_measured_and_said(hflow: Command, here: Path) -> None:
    assert f"  images: {R}x{R} grey\n" in ok(hflow("info", here)).out
    ok(hflow("check", here, "--images", "photos"))
    model, data = open_reference(here / "model.safetensors"), select(Path("photos"), R, "all", channels=1)
    found, exported = (
        bits_per_dim(model, data, session=session).bounds["strict"] for session in (None, session_of(here))
    )
    assert found.latents[0].dimensions == R * R
    assert 4 < found.total.mean < 12
    assert exported.total.mean == pytest.approx(found.total.mean, rel=1e-5)


def test_a_dataset_of_grey_images(hflow: Command, here: Path) -> None:
    made = ok(hflow("dataset", "photos", "-o", "grey.npy", "--resolution", R, "--channels", 1))
    assert f"12 images of {R}x{R} grey in grey.npy" in made.out
    assert np.load("grey.npy").shape == (12, 1, R, R)
    np.testing.assert_array_equal(session_of(here).read("grey.npy"), session_of(here).read("photos"))
    refused(hflow("dataset", "photos", "-o", "x.npy", "--resolution", R, "--channels", 2), "channels must be 3, or 1")
    ok(hflow("train", "--config", here / "run.json", "--data", "grey.npy", "--out", "again", "--images", 4))
    assert json.loads(Path("again/run.json").read_text())["model"]["channels"] == 1
