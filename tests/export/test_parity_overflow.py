"""Images that are too far from what a model was trained on prove nothing, and the report says why."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hflow_rt.errors import DataError
from hflow_rt.export import parity
from hflow_rt.runtime import load


def test_a_model_that_overflows_on_the_images_asks_for_others(
    tiny_run: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_outputs = parity._Pair.plain_outputs

    def overflowing(pair: parity._Pair, values: Any) -> dict[str, Any]:
        return {name: value * np.float32(np.inf) for name, value in plain_outputs(pair, values).items()}

    monkeypatch.setattr(parity._Pair, "plain_outputs", overflowing)
    images = np.full((1, 3, 16, 16), 0.5, np.float32)
    with load(tiny_run) as session, pytest.raises(DataError, match=r"overflows on these images.*--images"):
        parity.run_parity(tiny_model, session, images)
