"""Animations: frames to .gif, .webp, .mp4, or to a .png strip for paper."""

import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.extras import needed
from hflow_rt.files import atomic_file, destination, is_folder, unusable
from hflow_rt.memory import need
from hflow_rt.runtime.images.pictures import (
    check_picture_size,
    check_pixels,
    coloured,
    grid_size,
    save_image,
    strip,
    to_picture,
    written_by,
)

__all__ = ["SUFFIXES", "check_animation", "check_frames", "kept", "save_animation"]

SUFFIXES = (".gif", ".webp", ".mp4", ".png")

_GIF_FPS = 50  # browsers slow down every frame shorter than 20 ms to 100 ms
# pixels; H.264 has no largest side but levels, of which the highest ends here
_SIDES = {".gif": 65_535, ".webp": 16_383, ".mp4": 16_384}
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
    if suffix == ".mp4":
        _encoder()


def check_frames(path: Path, count: int, side: int) -> None:
    """Raise what `save_animation` would for `count` square frames of `side`, before any is made."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        check_picture_size(path, *grid_size(count, side, count))
    elif side > _SIDES[suffix]:
        raise DataError(
            f"{path}: a {suffix} ends at {_SIDES[suffix]:,} pixels a side, and these frames have {side:,}; "
            "ask for fewer rows and columns"
        )
    if suffix == ".gif":  # whose writer holds all frames, a byte a pixel
        need(count * side**2, f"a .gif of {count:,} frames", "ask for fewer, or name a .webp or .mp4")


def kept(frames: Iterable[NDArray[np.uint8]], beside: Path) -> NDArray[np.uint8]:
    """All frames of uint8 batches `[n, H, W, C]`, in a nameless file on the disk of `beside`: memory holds one batch.

    Raises `DataError` for no frames and where the disk is full.
    """
    folder = destination(beside).parent
    shape: tuple[int, ...] = ()
    count = 0
    try:
        with tempfile.TemporaryFile(dir=folder if is_folder(folder) else None) as file:
            for batch in frames:
                file.write(np.ascontiguousarray(batch).data)
                count, shape = count + len(batch), batch.shape[1:]
            if not count:
                raise DataError("an animation needs at least 1 frame; found none")
            file.flush()
            return np.memmap(file, np.uint8, "r", shape=(count, *shape))  # which outlives the file
    except OSError as error:
        raise unusable(beside, error, "write") from error


def save_animation(path: Path | str, frames: NDArray[np.uint8], fps: float, order: Sequence[int] | None = None) -> None:
    """Write uint8 frames `[T, H, W, C]` at `fps`, in the format the suffix names; gif and webp loop for ever.

    order: numbers of the frames as they are shown, each as often as one likes; by default all, once. One frame at a
    time is in memory where `frames` is a file (`kept`), but for .gif, whose writer holds a byte a pixel.

    Both store a frame equal to the one before as a longer display of that one. mp4 repeats the last row or
    column of odd sizes. png is one row of all frames.
    Raises `DataError` for another suffix, wrong frames, an fps out of range or an unwritable place, and
    `BackendUnavailable` where PyAV or an H.264 encoder is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check_animation(path, fps)
    check_pixels(frames, "frames")
    order = range(len(frames)) if order is None else order
    if suffix == ".png":
        save_image(path, strip(frames if len(order) == len(frames) else frames[order]))
        return
    check_frames(path, len(order), max(frames.shape[1:3]))
    if suffix == ".mp4":
        _save_mp4(path, frames, fps, order)
    else:
        _save_pillow(path, frames, order, _durations(len(order), fps, 10 if suffix == ".gif" else 1))


class _Reel(Image.Image):
    """Frames as Pillow's writers walk through them: `seek` makes one the picture, and no other is held."""

    def __init__(self, frames: NDArray[np.uint8], order: Sequence[int]) -> None:
        super().__init__()
        self._frames, self._order = frames, order
        self.n_frames = len(order)
        self.seek(0)

    def seek(self, frame: int) -> None:
        if not 0 <= frame < self.n_frames:
            raise EOFError
        shown = to_picture(np.ascontiguousarray(self._frames[self._order[frame]]))
        self.im, self._mode, self._size, self._at = shown.im, shown.mode, shown.size, frame

    def tell(self) -> int:
        return self._at


def _save_pillow(path: Path, frames: NDArray[np.uint8], order: Sequence[int], durations: list[int]) -> None:
    name, quality = ("GIF", {}) if path.suffix.lower() == ".gif" else ("WEBP", {"quality": 90})
    with atomic_file(path) as temporary:
        _Reel(frames, order).save(
            temporary, name, save_all=True, duration=durations, loop=0, **quality, **written_by(name)
        )


def _durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds of each frame in multiples of `unit`; the rounding does not add up over the frames."""
    times = [round(index * 1000 / fps / unit) * unit for index in range(count + 1)]
    return [later - earlier for earlier, later in pairwise(times)]


def _save_mp4(path: Path, frames: NDArray[np.uint8], fps: float, order: Sequence[int]) -> None:
    import av

    encoder = _encoder()
    height, width = frames.shape[1] + frames.shape[1] % 2, frames.shape[2] + frames.shape[2] % 2
    margin = ((0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0))
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
        for index in order:
            even = np.pad(coloured(frames[index]), margin, mode="edge")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode(None))


def _encoder() -> str:
    with needed("av", "writing .mp4 needs PyAV, which is missing; pip install 'hflow-rt[video]' or name a .gif"):
        import av  # noqa: F401 - whose parts may be loaded without it
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
