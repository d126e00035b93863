"""Curves of a run's log: read without what a resumed training left behind, in panels, as a picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_rt.errors import DataError
from hflow_rt.runs import TENSORBOARD
from hflow_rt.training.curves import draw_curves, panel_of, read_curves
from hflow_rt.training.log import Log


@pytest.mark.parametrize(
    ("tag", "panel"),
    [
        ("loss", ("loss", "model")),
        ("judge/loss", ("loss", "judge")),
        ("judge/terms/p", ("judge/terms", "p")),
        ("samples/frechet", ("samples/frechet", "frechet")),
        ("images_per_second", ("images_per_second", "images_per_second")),
        ("bits_per_dim/held_out_strict", ("bits_per_dim", "held_out_strict")),
    ],
)
def test_panels(tag: str, panel: tuple[str, str]) -> None:
    assert panel_of(tag) == panel


def test_a_resumed_run_is_one_line(tmp_path: Path) -> None:
    for begun, shift in ((0, 0.0), (30, 5.0)):
        log = Log(tmp_path / TENSORBOARD, begun, writes=True)
        for images in range(begun + 10, begun + 60, 10):
            log.scalars({"loss": images / 10 + shift, "judge/loss": 1.0, "samples/frechet": 300.0 - images}, images)
        log.close()
    found = read_curves(tmp_path)
    assert found["loss"].images.tolist() == [10, 20, 30, 40, 50, 60, 70, 80]
    assert found["loss"].values.tolist() == [1, 2, 3, 9, 10, 11, 12, 13]
    assert draw_curves(found, tmp_path / "curves.png", "a run") == ["samples/frechet", "loss"]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 260)
        assert np.asarray(image.convert("L")).std() > 10


def test_a_run_without_a_log(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / TENSORBOARD):
        folder.mkdir(exist_ok=True)
        with pytest.raises(DataError, match="has no log to draw"):
            read_curves(tmp_path)
