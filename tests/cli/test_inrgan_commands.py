"""Commands on a model that has no inverse, whose images have any size and whose layers have values of their own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import ok, pixels, refused
from PIL import Image
from safetensors.numpy import load_file

from hflow_rt.errors import DataError
from hflow_rt.evaluation.features import FeatureNetwork
from hflow_rt.runtime import load
from hflow_rt.runtime.latents import latent_views as views
from hflow_rt.runtime.latents.files import as_made

Command = Callable[..., Any]


@pytest.fixture
def generator(slots_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as the latest run, and two pictures."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(slots_run, "runs/tiny")
    ramp = np.broadcast_to(np.linspace(0, 255, 20)[:, None, None], (20, 20, 3)).astype(np.uint8)
    Image.fromarray(ramp).save("a.png")
    Image.fromarray(ramp[::-1].copy()).save("b.png")
    return Path("runs/tiny")


def test_a_projection_goes_on_in_other_commands(
    hflow: Command, generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hflow_rt.projection.projecting.unlikeness",
        lambda features, targets: lambda images: (images - targets).square().flatten(1).sum(1),
    )
    options = ("--steps", 5, "--video", "way.webp", "--picture", "found.png")
    report = json.loads(ok(hflow("project", "a.png", "b.png", *options, "--json")).out)
    assert (report["space"], report["images"], report["search_steps"]) == ("w", ["a.png", "b.png"], 5)
    found = load_file("projected.safetensors")
    assert found["w"].shape == (2, 7, 8)
    with Image.open("way.webp") as way:
        assert way.n_frames == 5  # type: ignore[attr-defined]
    assert pixels("found.png").shape[0] > 32
    ok(hflow("decode", "projected.safetensors", "-o", "decoded"))
    with load(generator) as session:
        image = session.decode("w", found)[1]
    assert np.abs(pixels("decoded/000001.png") - 255 * image.transpose(1, 2, 0)).max() <= 0.51
    walked = ok(hflow("interpolate", "projected.safetensors", "--frames", 3, "-o", "walk.png", "--json"))
    assert json.loads(walked.out)["space"] == "w"
    mixed = ok(hflow("mix", "--row-images", "projected.safetensors", "--columns", "1-3", "--slots", "0-2,5"))
    assert mixed.out.splitlines()[0] == "2 x 3 mixes, slots 0 1 2 5 of the row: mix.png"
    refused(hflow("interpolate", "projected.safetensors", "--space", "z"), "is in space w, not z; choose files of one")
    ok(hflow("sample", "-n", 3, "--centre-of", 5, "--latents", "others.safetensors"))
    made = ok(hflow("attribute", "make", "projected.safetensors", "others.safetensors", "-o", "away.safetensors"))
    assert made.out.startswith("2 images of projected.safetensors against 3 of others.safetensors, in w:")
    ok(hflow("attribute", "apply", "away.safetensors", "projected.safetensors", "--gain", "-1:0:2", "-o", "away.png"))
    others, vector = load_file("others.safetensors")["w"].mean(0), load_file("away.safetensors")["direction"]
    np.testing.assert_allclose(found["w"].mean(0) - vector, others, atol=1e-5)
    line = "'z' is in space z, which nothing leads to from space w"
    refused(hflow("attribute", "make", "projected.safetensors", "others.safetensors", "--in", "z"), line)


def test_neighbours_in_features(hflow: Command, generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is in the set is nearest to itself; samples need no inverse."""
    means = FeatureNetwork("means", "", "", "", "", 3, lambda pixels: pixels.mean((2, 3)).astype(np.float32))
    monkeypatch.setattr("hflow_rt.evaluation.features.open_features", lambda *asked: means)
    at = ("neighbours", "--data", "pictures", "--features", "means", "-k", 1, "--json")
    Path("pictures").mkdir()
    for level in (0, 40, 90):
        Image.new("RGB", (16, 16), (level, level, level)).save(f"pictures/{level}.png")
    report = json.loads(ok(hflow(*at, "pictures/40.png")).out)
    assert (report["space"], report["in"], report["searched"]) == ("features", "means", 3)
    assert report["nearest"][0]["means"] == [{"image": "40.png", "distance": 0.0}]
    assert len(json.loads(ok(hflow(*at, "--samples", 2)).out)["nearest"]) == 2
    refused(hflow(*at, "--in", "w"), "--features and --in each say what is compared")


def test_a_target_that_is_not_taken_as_it_is(hflow: Command, generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hflow_rt.projection.projecting.unlikeness",
        lambda features, targets: lambda images: (images - targets).square().flatten(1).sum(1),
    )
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save("clear.png")
    said = ok(hflow("project", "clear.png", "--steps", 1, "--picture", "found.png")).err.splitlines()
    assert "clear.png has an alpha channel; what is transparent is taken as white" in said
    assert "clear.png is 40x20; the largest square in the middle is taken" in said
    Image.new("RGB", (40, 8)).save("flat.png")
    refused(
        hflow("project", "flat.png"), "flat.png cannot be used: it is 40x8, smaller than 16; give a square image of"
    )


def test_a_latents_file_keeps_its_controls(hflow: Command, generator: Path) -> None:
    for psi in (0.2, 0.3):
        ok(hflow("sample", "-n", 2, "--control", f"psi={psi}", "--latents", f"{psi}.safetensors"))
    ok(hflow("decode", "0.2.safetensors", "-o", "decoded"))
    ok(hflow("interpolate", "0.2.safetensors", "--frames", 2, "-o", "walk.png", "--loop"))
    with load(generator) as session:
        (latents,) = session.draw([0, 1])
        image = session.forward(latents, {"psi": 0.2})
        assert np.abs(image - session.forward(latents)).max() > 0.05
        held = session.with_controls({"psi": 0.2})
        np.testing.assert_array_equal(held.forward(latents), image)
        assert held.controls == session.controls | {"psi": 0.2}
        shown = views.between(as_made(session, [Path("0.2.safetensors")]), latents, 2)
        np.testing.assert_allclose(np.concatenate(list(shown)), image, atol=1e-5)
        with pytest.raises(DataError, match="control psi must be a number in 0"):
            session.with_controls({"psi": 3.0})
    first = pixels("decoded/000000.png")
    assert np.abs(first - 255 * image[0].transpose(1, 2, 0)).max() <= 0.51
    refused(hflow("interpolate", "0.2.safetensors", "0.3.safetensors"), "were made with different controls or steps")
    refused(hflow("mix", "--row-images", "0.2.safetensors", "--column-images", "0.3.safetensors"), "different controls")


def test_mixing_by_slots(slots_run: Path) -> None:
    """With all slots of the row it is the row, with none the column."""
    with load(slots_run) as session:
        assert views.space_of_slots(session) == "w"
        assert views.parse_slots(session, "w", []) == [0, 1, 2]
        (drawn,) = session.draw(range(3), option="cat")
        values = session.into_space("w", drawn)
        row, columns = views.select(values, 0), {name: value[1:] for name, value in values.items()}
        images = session.forward(drawn)
        for slots, expected in ((range(7), images[[0, 0]]), ([], images[1:])):
            np.testing.assert_allclose(views.slots_row(session, "w", row, columns, slots), expected, atol=1e-5)


def test_truncation_is_swept(hflow: Command, generator: Path) -> None:
    """psi 1 is not the default of this model, which is 0.5."""
    found = ok(hflow("temperature", "-n", 2, "--at", "0:1:3", "--of", "psi", "--json"))
    changes = json.loads(found.out)["rms_change"]
    assert changes[1] < 1e-6 < min(changes[0], changes[2])


def test_samples_are_pulled_towards_a_centre_of_their_own(hflow: Command, generator: Path) -> None:
    """At 0 all are the image of the mean of w, and at 1 they are what they were."""
    at = ("sample", "-n", 2, "--label", "cat", "--centre-of", 40, "--control", "psi=1", "--latents", "w.safetensors")
    ok(hflow(*at, "--pull", 0, "-o", "middle"))
    middle = load_file("w.safetensors")["w"]
    with load(generator) as session:
        expected = np.mean(
            [
                session.into_space("w", one)["w"][0]
                for one in session.draw(range(1 << 40, (1 << 40) + 40), option="cat", batch=1)
            ],
            0,
        )
    np.testing.assert_allclose(middle, np.stack([expected, expected]), atol=1e-5)
    ok(hflow(*at, "--pull", 1, "-o", "same"))
    ok(hflow("sample", "-n", 2, "--label", "cat", "--control", "psi=1", "-o", "plain"))
    assert np.abs(pixels("same/000001.png").astype(int) - pixels("plain/000001.png")).max() <= 1
    ok(hflow("decode", "w.safetensors", "-o", "again"))


def test_resolution_and_region(hflow: Command, generator: Path) -> None:
    ok(hflow("sample", "-n", 1, "--resolution", 32, "--region", "0,0.5,0.5,1", "-o", "part"))
    ok(hflow("sample", "-n", 1, "-o", "whole"))
    part, whole = (pixels(f"{folder}/000000.png") for folder in ("part", "whole"))
    assert np.abs(part[::4, ::4].astype(int) - whole[8:, :8]).max() <= 1
    assert {path.name for path in generator.glob("bundle*")} == {"bundle", "bundle-32-0,0.5,0.5,1"}
    refused(hflow("export", "--resolution", 24), "resolution must be a multiple of the model's 16; found 24; choose 32")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("encode a.png", "images only; 'hflow-rt project IMAGE' searches for those of an image"),
        ("neighbours", "--features efficientnet-lite0 compares images as they are"),
        ("mix --slots 0-7", "this model has the slots 0-6; found 7"),
        ("mix --slots 0 --cut z", "--cut, --from-rows and --slots each say what the rows give; keep one of them"),
        ("project a.png --steps 0", "the number of steps must be at least 1, not 0"),
        ("project a.png --space y", "'y' cannot be searched; this model has w, z"),
        ("project a.png --control psi=9", "control psi must be a number in 0 .. 2; found 9.0"),
        ("temperature -n 1", "no temperature applies to the latents of this inrgan model; give a control the values"),
        ("sample --std 0.7", "no std applies to the latents of this inrgan model; omit it; it has psi, cutoff to set"),
        ("sample --control cutoff=8", "control cutoff must be a number in 0 .. 7; found 8.0"),
        ("sample --control psi=nan", "control psi must be a number in 0 .. 2; found nan"),
        ("sample --region 0.5,0.5,1.5,1.5", "a region LEFT,TOP,RIGHT,BOTTOM must rise within 0 .. 1"),
    ],
)
def test_what_is_refused(hflow: Command, generator: Path, arguments: str, line: str) -> None:
    refused(hflow(*arguments.split()), line)
