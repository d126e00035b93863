"""From floats to 8-bit levels."""

import numpy as np
import pytest

from hflow_rt.data.pixels import to_levels
from hflow_rt.errors import DataError


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_levels_come_back_and_the_rest_is_rounded_and_clipped(kind: type) -> None:
    levels = np.arange(2 * 3 * 8 * 8, dtype=np.uint32).astype(np.uint8).reshape(2, 3, 8, 8)
    np.testing.assert_array_equal(to_levels((levels / 255).astype(kind)), levels)
    for value, level in ((-0.2, 0), (1.3, 255), (0.3 / 255, 0), (254.7 / 255, 255)):
        found = to_levels(np.full((1, 3, 2, 2), value, kind))
        assert found.dtype == np.uint8
        assert (found == level).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 4, 4), np.float32), "images must be float"),
        (np.zeros((1, 4, 4, 3), np.float32), "images must be float"),
        (np.zeros((1, 3, 4, 4), np.uint8), "images must be float"),
        (np.full((1, 3, 4, 4), np.nan, np.float32), "pixels must be finite"),
    ],
)
def test_what_no_image_is(images: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_levels(images)
