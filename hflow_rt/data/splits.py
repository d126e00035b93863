"""Which images are trained on and which are held out to measure: their folders say it, or a hash of their names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Split", "split_names"]

# Held out when the folders do not say it: one image in ten.
HELD_OUT = 0.1

_TAIL = r"[ _-]?(set|images?|data|\d+)?"  # training_set, test-images, val2017
_TRAINING = re.compile(f"(train|training){_TAIL}", re.IGNORECASE)
_HELD_OUT = re.compile(f"(test|testing|val|valid|validation|eval|evaluation|dev){_TAIL}", re.IGNORECASE)
_SHOWN = 4  # folders named in a sentence


@dataclass(frozen=True)
class Split:
    """Indices of the images to train on and of those held out, both ascending, and what decided between them."""

    training: NDArray[np.int64]
    held_out: NDArray[np.int64]
    by: str

    def __str__(self) -> str:
        return f"{len(self.training)} images to train on, {len(self.held_out)} held out, by {self.by}"


def split_names(names: Sequence[str]) -> Split:
    """Split images called `names`, with `/` between folders.

    Folders such as `train/` and `test/` or `val/` decide where there are both: an image belongs to the outermost
    folder around it that is called so, and to the training part if none is. A folder around all the others does not
    count. Otherwise a hash of the name decides (about a tenth is held out), so that adding images moves none from
    one side to the other, save in sets so small that the rule would leave a side empty. A single image is trained on.
    """
    above = _common(names)
    found = [_split_folder(name, above) for name in names]
    held = np.array([side == "held out" for _, side in found])
    folders = {side: sorted({folder for folder, its in found if its == side}) for side in ("training", "held out")}
    if all(folders.values()):
        by = f"the folders {_listed(folders['training'])} and {_listed(folders['held out'])}"
    else:
        alone = folders["held out"]
        by = "a hash of the names" + (f", because {_listed(alone)} has no train/ beside it" if alone else "")
        held = _drawn(names)
    return Split(np.flatnonzero(~held), np.flatnonzero(held), by)


def _common(names: Sequence[str]) -> str:
    """The folder, with its own `/`, below which there are several folders or none; images beside it do not matter."""
    above = ""
    while True:
        inside = {name[len(above) :].partition("/")[0] for name in names if "/" in name[len(above) :]}
        if len(inside) != 1:
            return above
        above += inside.pop() + "/"
        names = [name for name in names if name.startswith(above)]


def _split_folder(name: str, above: str) -> tuple[str, str | None]:
    """The outermost folder around `name`, below `above`, that is called like a side, with its own `/`; its side."""
    folders = name[len(above) :].split("/")[:-1] if name.startswith(above) else []
    for count, folder in enumerate(folders, 1):
        if side := _side(folder):
            return above + "/".join(folders[:count]) + "/", side
    return "", None


@lru_cache(maxsize=4096)
def _side(folder: str) -> str | None:
    if _TRAINING.fullmatch(folder):
        return "training"
    return "held out" if _HELD_OUT.fullmatch(folder) else None


def _listed(folders: Sequence[str]) -> str:
    return ", ".join(folders[:_SHOWN]) + (", ..." if len(folders) > _SHOWN else "")


def _drawn(names: Sequence[str]) -> NDArray[np.bool_]:
    draw = np.array([_uniform(name) for name in names])
    held = draw < HELD_OUT
    if len(held) == 1 or held.all():
        held[draw.argmax()] = False
    elif not held.any():
        held[draw.argmin()] = True
    return held


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
