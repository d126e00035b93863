"""What each call of a model of many steps costs, as numbers and as a picture."""

from pathlib import Path

import numpy as np
from PIL import Image

from hflow_rt.evaluation.figures import Estimate
from hflow_rt.evaluation.steps import StepBits, chart


def test_the_picture(tmp_path: Path) -> None:
    found = StepBits(tuple(Estimate.of(np.array([k, k + 0.5])) for k in (1.0, 4.0, 2.0)))
    assert found.total == 7.75
    assert found.lines() == ["3 calls, each measured: 7.750 bits/dim, most in call 2: 4.250"]
    assert found.dump()[1] == {"mean": 4.25, "standard_error": 0.25, "n": 2}
    chart(found, tmp_path / "steps.png")
    picture = np.asarray(Image.open(tmp_path / "steps.png").convert("RGB"))
    assert (picture == (47, 109, 181)).all(-1).sum() > 100  # the line
