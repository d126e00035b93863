"""Bring an image to the resolution and the channels of the model: square first, then Lanczos, then grey."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hflow_rt.data.colour import luminance
from hflow_rt.data.image_files import Skipped

__all__ = ["Crop", "fit"]

Crop = Literal["center", "none"]


def fit(image: Image.Image, resolution: int, crop: Crop = "center", channels: int = 3) -> NDArray[np.uint8] | Skipped:
    """An RGB image as uint8 `[C, R, R]`; with one channel its luminance.

    `crop="center"` keeps the largest square in the middle, `crop="none"` skips what is not square. An image
    whose shorter side is below `resolution` is skipped: enlarging would teach the model blur.
    """
    width, height = image.size
    side = min(width, height)
    if side < resolution:
        return Skipped("too small", f"it is {width}x{height}, smaller than {resolution}", size=image.size)
    if width != height:
        if crop == "none":
            return Skipped("not square", f"it is {width}x{height} and cropping is off")
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    if channels == 1:  # last, so that it is the luminance of what a colour model sees
        image = luminance(image)
    return np.ascontiguousarray(np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1))
