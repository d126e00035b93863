"""How the images of a model of many steps come to be: an animation from start to image, or a table of some steps."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError
from hflow_rt.runtime.images.pictures import (
    Row,
    check_picture_size,
    grid,
    grid_size,
    save_image,
    table,
    table_size,
    to_uint8,
)
from hflow_rt.runtime.images.video import check_animation, check_frames, save_animation

if TYPE_CHECKING:
    from hflow_rt.runtime.session import Session

__all__ = ["check_trajectory", "save_trajectory"]

_SHOWN, _ROWS = 10, 8  # steps of a table, images of it
_SECONDS, _HELD = 4, 1  # of an animation on the way, and at its end
_FPS = 25


def check_trajectory(session: "Session", path: Path, number: int) -> None:
    """Raise `DataError` for a model that takes one step, and what `save_trajectory` would for so many images."""
    if session.steps == 1:
        raise DataError(f"a trajectory needs a model of many steps; {session.manifest.family} takes one; omit it")
    if path.suffix.lower() == ".png":
        check_picture_size(path, *table_size(_SHOWN, min(number, _ROWS), session.resolution))
        return
    check_animation(path, _FPS)
    check_frames(path, (_SECONDS + _HELD) * _FPS, max(grid_size(number, session.resolution)))


def save_trajectory(path: Path, steps: Iterable[NDArray[np.float32]], count: int) -> None:
    """Write images `[B, C, R, R]` in [0, 1] of `count` steps, in the format that the suffix names."""
    as_table = path.suffix.lower() == ".png"
    wanted = np.linspace(0, count - 1, min(count, _SHOWN if as_table else _SECONDS * _FPS)).round().astype(int)
    kept = [to_uint8(images) for index, images in enumerate(steps) if index in wanted]
    if as_table:
        shown = np.stack([images[:_ROWS] for images in kept], 1)
        titles = [f"{index + 1}" for index in wanted]
        save_image(path, table([*map(Row, shown[:-1]), Row(shown[-1], captions=titles)]))
        return
    frames = [np.asarray(grid(images)) for images in kept]
    channels = kept[0].shape[-1]
    pictures = np.stack([frame.reshape(*frame.shape[:2], channels) for frame in frames])
    fps = max(1, round(len(pictures) / _SECONDS))
    save_animation(path, pictures, fps, [*range(len(pictures)), *[len(pictures) - 1] * (_HELD * fps)])
