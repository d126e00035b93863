"""Conditions beside image or latents, such as a class: one of several named options each, as one-hot vectors.

`conditions` maps the name of a condition to its options, e.g. `labels` to ("boot", "coat").
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError
from hflow_rt.files import is_folder

__all__ = ["Options", "by_folder", "check_conditions", "class_folder", "in_turn", "of_option"]

Options = Mapping[str, tuple[str, ...]]
_OneHot = dict[str, NDArray[np.float32]]
_ROUNDING = 1e-3  # of a mixture's sum


def by_folder(conditions: Options, names: Sequence[str]) -> _OneHot:
    """One-hot `[len(names), options]` of images in a set, each by that of its folders that is called like an option.

    Raises `DataError` for an image in no such folder.
    """
    return {key: _rows([_folder(key, options, name) for name in names], options) for key, options in conditions.items()}


def class_folder(conditions: Options, path: Path) -> str:
    """What to put before the names of images in `path`, a file or folder, for `by_folder`: `boot/` in a folder boot."""
    path = Path(os.path.abspath(path))  # a link has the name it was given
    name = path.name if is_folder(path) else path.parent.name
    return f"{name}/" if any(name in options for options in conditions.values()) else ""


def check_conditions(conditions: Options, given: Mapping[str, Any]) -> None:
    """Raise `DataError` unless `given` `[B, options]`, arrays or tensors, are one-hot or mixtures of options."""
    for name in conditions:
        rows = given[name]
        fine = (rows >= 0) & (rows <= 1) & (abs(rows.sum(1) - 1) < _ROUNDING)[:, None]
        if not fine.all():  # NaN is neither
            raise DataError(
                f"{name} must be one-hot, or a mixture: numbers in [0, 1] with the sum 1; found others, or NaN"
            )


def in_turn(conditions: Options, indices: Sequence[int]) -> _OneHot:
    """One-hot `[len(indices), options]`: image i has option i modulo their number."""
    return {key: _rows([index % len(options) for index in indices], options) for key, options in conditions.items()}


def of_option(conditions: Options, option: str, count: int) -> _OneHot:
    """One-hot `[count, options]`, the same for all. Raises `DataError` for an unknown option, or one of several."""
    if len(conditions) != 1:
        raise DataError(f"this model knows no classes; omit '{option}'")
    ((key, options),) = conditions.items()
    if option not in options:
        raise DataError(f"unknown option '{option}' of {key}; known: {', '.join(options)}")
    return {key: _rows([options.index(option)] * count, options)}


def _folder(key: str, options: tuple[str, ...], name: str) -> int:
    found = [folder for folder in PurePosixPath(name).parts[:-1] if folder in options]
    if not found:
        raise DataError(
            f"images need a folder named after one of the {key} ({', '.join(options[:8])}"
            f"{', ...' if len(options) > 8 else ''}); '{name}' is in none"
        )
    return options.index(found[-1])


def _rows(chosen: Sequence[int], options: tuple[str, ...]) -> NDArray[np.float32]:
    return np.eye(len(options), dtype=np.float32)[np.asarray(chosen, dtype=np.int64)]
