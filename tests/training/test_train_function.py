"""`hflow_rt.train`, which the command calls."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hflow_rt
from hflow_rt.errors import ConfigError
from hflow_rt.runs import read_run


@pytest.fixture
def photos(tmp_path: Path, images: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The toy's images as files, in the folder that is current."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name, pixels in zip(images.names, images.array, strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(Path("photos") / name)
    return "photos"


def test_train_and_go_on(photos: str) -> None:
    seen = []
    result = hflow_rt.train(
        "toy", photos, "runs/x", images=16, device="cpu", settings=["training.log_every=1"],
        on_progress=lambda progress: seen.append(progress.images),
    )  # fmt: skip
    assert (result.run, result.images, result.stopped_by) == (Path("runs/x"), 16, "images")
    assert seen[-1] == 16
    assert Path("runs/x/samples/000000016.png").is_file()
    about = read_run("runs/x")
    assert about["training"]["log_every"] == 1
    assert about["run"]["data"]["source"] == str(Path("photos").absolute())
    more = hflow_rt.train(resume=True, images=24)  # the latest run
    assert (more.run, more.images) == (Path("runs/x"), 24)
    earlier = hflow_rt.train(resume="runs/x/checkpoints/000000016", images=24)
    assert (earlier.run, earlier.images) == (Path("runs/x"), 24)
    other = hflow_rt.train(start="runs/x", data=photos, images=8)
    assert other.run.parent == Path("runs")
    assert read_run(other.run)["run"]["from"]["name"] == "runs/x/model.safetensors"


def test_train_says_what_it_leaves_out_and_refuses(photos: str) -> None:
    Path("photos/broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="45 images; not used: 1 not an image") as caught:
        hflow_rt.train("toy", photos, images=8)
    assert caught[0].filename == __file__
    Path("photos/broken.png").unlink()
    with pytest.raises(ConfigError, match="minutes must be > 0"):
        hflow_rt.train("toy", photos, "runs/none", minutes=-1)
    assert not Path("runs/none").exists()
    with pytest.raises(ConfigError, match="unknown preset 'hflow-demi'"):
        hflow_rt.train("hflow-demi")
    with pytest.raises(ConfigError, match="weights and settings from the run"):
        hflow_rt.train("toy", resume=True)
