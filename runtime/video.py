"""Animations: frames to .gif, .webp, .mp4, or to a .png strip for paper."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.files import atomic_file
from hflow_rt.runtime.pictures import check_pixels, save_image, strip

__all__ = ["SUFFIXES", "check_animation", "save_animation"]

SUFFIXES = (".gif", ".webp", ".mp4", ".png")

_GIF_FPS = 50  # browsers slow down every frame shorter than 20 ms to 100 ms
_ENCODERS = ("libx264", "h264")
_BT709 = 1  # the code of this colour matrix, its primaries and its curve alike
_STUDIO_RANGE = 1  # luma 16 .. 235, what players expect of H.264


def check_animation(path: Path, fps: float) -> None:
    """Raise what `save_animation` would for the name and the speed, before any frame is made."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"an animation must end in {', '.join(SUFFIXES)}; found '{path.name}'; rename it")
    limit = _GIF_FPS if suffix == ".gif" else 240
    if not 0.1 <= fps <= limit:  # NaN fails as well
        raise DataError(f"{suffix} needs 0.1 .. {limit} frames per second; found {fps}; choose another")


def save_animation(path: Path | str, frames: NDArray[np.uint8], fps: float) -> None:
    """Write uint8 frames `[T, H, W, 3]` at `fps`, in the format the suffix names; gif and webp loop for ever.

    Both store a frame equal to the one before as a longer display of that one. mp4 repeats the last row or
    column of odd sizes. png is one row of all frames.
    Raises `DataError` for another suffix, wrong frames, an fps out of range or an unwritable place, and
    `BackendUnavailable` where PyAV or an H.264 encoder is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check_animation(path, fps)
    check_pixels(frames, "frames")
    if suffix == ".png":
        save_image(path, strip(frames))
    elif suffix == ".mp4":
        _save_mp4(path, frames, fps)
    else:
        _save_pillow(path, frames, _durations(len(frames), fps, 10 if suffix == ".gif" else 1))


def _save_pillow(path: Path, frames: NDArray[np.uint8], durations: list[int]) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    quality: dict[str, Any] = {} if path.suffix.lower() == ".gif" else {"quality": 90}
    with atomic_file(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0, **quality)


def _durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds of each frame in multiples of `unit`; the rounding does not add up over the frames."""
    times = [round(index * 1000 / fps / unit) * unit for index in range(count + 1)]
    return [later - earlier for earlier, later in pairwise(times)]


def _save_mp4(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise BackendUnavailable(
            "writing .mp4 needs PyAV, which is missing; pip install 'hflow-rt[video]' or name a .gif"
        ) from error
    encoder = _encoder()
    height, width = frames.shape[1] + frames.shape[1] % 2, frames.shape[2] + frames.shape[2] % 2
    even = np.pad(frames, ((0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0)), mode="edge")
    with atomic_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if encoder == "libx264":
            stream.options = {"crf": "16"}  # small frames of smooth colour show blocks at the default of 23
        context = stream.codec_context
        # say which colours these are: players guess them from the size otherwise
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _STUDIO_RANGE
        for frame in even:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode(None))


def _encoder() -> str:
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    for name in _ENCODERS:
        try:
            Codec(name, "w")
        except UnknownCodecError:
            continue
        return name
    raise BackendUnavailable(
        f"writing .mp4 needs an H.264 encoder ({' or '.join(_ENCODERS)}), which this PyAV lacks; "
        "pip install --force-reinstall av, or name a .gif or .webp"
    )
