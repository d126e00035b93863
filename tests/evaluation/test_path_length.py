"""Path lengths against what they must be where images are linear in values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.evaluation.path_length import STEP, path_length, trimmed
from hflow_rt.evaluation.perception import perception

CPU = torch.device("cpu")


def as_they_are(images: torch.Tensor) -> list[torch.Tensor]:
    return [images[:, :1], images[:, 1:]]


def stepped(part: range) -> tuple[np.ndarray, np.ndarray]:
    """Pair p moves by p along one number, in float64, which a step as small needs to be seen to many digits."""
    ends = np.zeros((len(part), 2, 1, 1))
    moved = ends.copy()
    moved[:, 1, 0, 0] = STEP * np.array(part)
    return ends, moved


def test_it_is_the_mean_square_of_the_slopes_without_the_outermost() -> None:
    found = path_length(stepped, "w", as_they_are, CPU, 300, batch=7)
    assert found.dump() == {"mean": pytest.approx(np.mean(np.arange(2, 298.0) ** 2)), "pairs": 300, "space": "w"}
    assert trimmed(np.arange(300.0)).tolist() == list(range(2, 298))
    one = path_length(stepped, "w", as_they_are, CPU, 1)
    assert one.mean == 0


def test_what_cannot_be_measured() -> None:
    with pytest.raises(DataError, match="the number of pairs must be at least 1, not 0"):
        path_length(stepped, "w", as_they_are, CPU, 0)
    with pytest.raises(DataError, match="path lengths must be finite"):
        path_length(stepped, "w", lambda images: [images / 0], CPU, 2)
    with pytest.raises(ConfigError, match=r"efficientnet-lite0 or a TorchScript file such as LPIPS; found a\.onnx"):
        perception("a.onnx", 8, CPU)


@pytest.mark.parametrize(("takes", "white"), [(None, 255.0), ("uint8", 255.0), ("float", 1.0)])
def test_a_file_sees_images_as_it_wants_them(scripted: Any, takes: str | None, white: float) -> None:
    class Whole(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    path: Path = scripted(Whole())
    grey = torch.tensor([0.25, -0.5]).reshape(1, 1, 1, 2)
    (found,) = perception(str(path), 2, CPU, takes)(grey)
    assert found.tolist() == [[white * value for value in (0.25, -0.5) * 3]]
