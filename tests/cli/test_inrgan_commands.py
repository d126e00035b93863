"""Commands on a model that has no inverse, whose images have any size and whose layers have values of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import last_line
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner

from hflow_rt.cli.__main__ import app
from hflow_rt.export.bundle import export_bundle
from hflow_rt.models.checkpoint import save_model
from hflow_rt.models.registry import Family, family


@pytest.fixture(scope="module")
def run(tiny: Callable[[Family], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    made = tiny(family("inrgan"))
    save_model(folder / "model.safetensors", "inrgan", made, made.state_dict(), {"images": 0})
    export_bundle(folder / "model.safetensors", folder / "bundle", np.zeros((1, 3, 16, 16), np.float32))
    return folder


@pytest.fixture
def hflow(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    ramp = np.broadcast_to(np.linspace(0, 255, 20)[:, None, None], (20, 20, 3)).astype(np.uint8)
    for name in "ab":
        Image.fromarray(ramp if name == "a" else ramp[::-1].copy()).save(f"{name}.png")
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments), "-m", str(run)])


def test_a_projection_goes_on_in_the_other_commands(
    hflow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    monkeypatch.setattr(
        "hflow_rt.projection.projecting.unlikeness",
        lambda features, targets: lambda images: (images - targets).square().flatten(1).sum(1),
    )
    done = hflow("project", "a.png", "b.png", "--label", "dog", "--steps", 5, "--video", "way.webp", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["space"], report["images"], report["steps"]) == ("w", ["a.png", "b.png"], 5)
    found = load_file("projected.safetensors")
    assert {name: values.shape for name, values in found.items()} == {"w": (2, 7, 8)}
    assert Image.open("way.webp").n_frames == 5
    decoded = hflow("decode", "projected.safetensors", "-o", "decoded")
    assert decoded.exit_code == 0, decoded.output
    assert sorted(path.name for path in Path("decoded").iterdir()) == ["000000.png", "000001.png"]
    walked = hflow("interpolate", "projected.safetensors", "--frames", 3, "-o", "walk.png", "--json")
    assert json.loads(walked.stdout)["space"] == "w"
    mixed = hflow("mix", "--row-images", "projected.safetensors", "--columns", "1-3", "--slots", "0-2,5")
    assert mixed.exit_code == 0, mixed.output
    assert mixed.stdout.splitlines()[0] == "2 x 3 mixes, slots 0 1 2 5 of the row: mix.png"
    refused = hflow("interpolate", "projected.safetensors", "--space", "z")
    assert last_line(refused) == "error: projected.safetensors is in space w, not z; choose files of one space"


def test_mixing_by_slots_is_truncation_blind(run: Path) -> None:
    """All slots of the row are the row, none of them the column."""
    from hflow_rt.runtime import load
    from hflow_rt.runtime.latents import latent_views as views

    with load(run) as session:
        assert views.space_of_slots(session) == "w"
        assert views.parse_slots(session, "w", []) == [0, 1, 2]
        (drawn,) = session.draw(range(3), option="cat")
        values = session.into_space("w", drawn)
        row, columns = views.select(values, 0), {name: value[1:] for name, value in values.items()}
        images = session.forward(drawn)
        whole = views.slots_row(session, "w", row, columns, range(7))
        np.testing.assert_allclose(whole, images[[0, 0]], atol=1e-5)
        none = views.slots_row(session, "w", row, columns, [])
        np.testing.assert_allclose(none, images[1:], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["encode", "a.png"], "an INR-GAN maps latents to images only; 'hflow-rt project IMAGE' searches for those of an image"),
        (["mix", "--slots", "0-7"], "this model has the slots 0-6; found 7"),
        (["mix", "--slots", "0", "--cut", "z"], "--cut, --from-rows and --slots each say what the rows give; keep one of them"),
        (["project", "a.png", "--steps", "0"], "the number of steps must be at least 1, not 0"),
        (["project", "a.png", "--space", "y"], "'y' cannot be searched; this model has w, z"),
        (["project", "a.png", "--control", "psi=9"], "control psi must be a number in 0 .. 2; found 9.0"),
    ],
)  # fmt: skip
def test_what_is_refused(hflow: Callable[..., Any], arguments: list[str], line: str) -> None:
    label = ["--label", "cat"] if arguments[0] in ("encode", "project") else []
    assert last_line(hflow(*arguments, *label)) == f"error: {line}"


def test_resolution_and_region(hflow: Callable[..., Any], run: Path) -> None:
    drawn = CliRunner().invoke(
        app, ["sample", str(run), "-n", "1", "--resolution", "32", "--region", "0,0,0.5,0.5", "-o", "part.png"]
    )
    assert drawn.exit_code == 0, drawn.output
    assert Image.open("part.png").size[0] >= 32
    refused = CliRunner().invoke(app, ["export", str(run), "--resolution", "24"])
    assert last_line(refused) == "error: resolution must be a multiple of the model's 16; found 24; choose 32"
    assert sorted(path.name for path in run.glob("bundle*")) == ["bundle", "bundle-32-0,0,0.5,0.5"]
