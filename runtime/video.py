"""Animations: frames to .gif, .webp, .mp4, or to a .png strip for paper."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.files import atomic_file
from hflow_rt.runtime.pictures import check_pixels, save_image, strip

__all__ = ["SUFFIXES", "save_animation"]

SUFFIXES = (".gif", ".webp", ".mp4", ".png")

_GIF_FPS = 50  # browsers slow down every frame shorter than 20 ms to 100 ms
_ENCODERS = ("libx264", "h264", "libopenh264")
_BT709 = 1  # the code of this colour matrix, its primaries and its curve alike
_STUDIO_RANGE = 1  # luma 16 .. 235, what players expect of H.264


def save_animation(path: Path | str, frames: NDArray[np.uint8], fps: float) -> None:
    """Write uint8 frames `[T, H, W, 3]` at `fps`, in the format the suffix names; gif and webp loop for ever.

    Both store a frame equal to the one before as a longer display of that one. mp4 repeats the last row or column
    of odd sizes. png is one row of all frames. Raises `DataError` for another suffix, wrong frames, an fps out
    of range or an unwritable place, and `BackendUnavailable` where PyAV or an H.264 encoder is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"an animation's name must end in {', '.join(SUFFIXES)}; found '{path.name}'; rename it")
    check_pixels(frames, "frames")
    limit = _GIF_FPS if suffix == ".gif" else 240
    if not 0.1 <= fps <= limit:  # NaN fails as well
        raise DataError(f"frames per second must be in 0.1 .. {limit} for {suffix}; found {fps}; choose another")
    if suffix == ".png":
        save_image(path, strip(frames))
    elif suffix == ".mp4":
        _save_mp4(path, frames, fps)
    else:
        _save_pillow(path, frames, _durations(len(frames), fps, 10 if suffix == ".gif" else 1))


def _save_pillow(path: Path, frames: NDArray[np.uint8], durations: list[int]) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    quality = {} if path.suffix.lower() == ".gif" else {"quality": 90}
    with atomic_file(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0, **quality)


def _durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds of each frame in multiples of `unit`, rounded so that the sum never drifts from `count / fps`."""
    times = [round(index * 1000 / fps / unit) * unit for index in range(count + 1)]
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def _save_mp4(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise BackendUnavailable(
            "writing .mp4 needs PyAV, which is not installed; pip install 'hflow-rt[video]', or name a .gif or .webp"
        ) from error
    encoder = next((name for name in _ENCODERS if name in av.codecs_available), None)
    ...
