"""From the float images that models make to the 8-bit levels that files and feature networks hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError

__all__ = ["to_levels"]


def to_levels(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Float `[B, C, R, R]` in [0, 1] to uint8 of the same shape, rounded; values a little outside are clipped.

    Raises `DataError` for another shape or type and for NaN.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype.kind != "f":
        raise DataError(f"images must be float [B, 3 or 1, R, R] in [0, 1]; found {images.dtype} {list(images.shape)}")
    if not np.isfinite(images).all():
        raise DataError("pixels must be finite; found NaN or infinity; lower the std or check the model")
    levels = np.rint(np.clip(images.astype(np.float32, copy=False), 0, 1) * np.float32(255))
    return np.asarray(levels, np.uint8)
