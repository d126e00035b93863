"""Which images of a set are looked at: those to train on, those held out, or all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hflow_rt.assets import demo_images
from hflow_rt.data.dataset import ImageSet, open_dataset
from hflow_rt.errors import ConfigError, DataError
from hflow_rt.limits import check_count

__all__ = ["SPLITS", "Selection", "select"]

# name -> what it is called in a sentence; see `ImageSet.split`
SPLITS = {"test": "held-out images", "train": "training images", "all": "images"}


@dataclass(frozen=True)
class Selection:
    """The images at `indices` of a set, which are its `split`, or as many of it as were asked for."""

    images: ImageSet
    indices: NDArray[np.int64]
    split: str
    source: str

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        return f"{len(self)} {SPLITS[self.split]} of {self.source}"

    @property
    def held_out(self) -> Selection | None:
        """The test images beside training images; None of other splits, and where there are less than two."""
        indices = self.images.split()[1]
        return (
            Selection(self.images, indices, "test", self.source) if self.split == "train" and len(indices) > 1 else None
        )

    @property
    def names(self) -> list[str]:
        """What these images are called in the set."""
        return [self.images.names[index] for index in self.indices]

    def pixels(self, part: range | NDArray[np.integer] | None = None) -> NDArray[np.uint8]:
        """All of them, or those at some places of the selection, uint8 `[n, C, R, R]`."""
        return self.images.pixels(self.indices if part is None else self.indices[part])


def select(
    source: Path | None, resolution: int, split: str = "test", limit: int | None = None, channels: int = 3
) -> Selection:
    """The images of a split of `source`, by default of the demo images; `limit` takes evenly spaced ones of them.

    channels: of the model, see `open_dataset`.
    Raises `ConfigError` for an unknown split and `DataError` for unusable images or none.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
    if limit is not None:
        check_count("the number of images", limit)
    try:
        images = open_dataset(demo_images() if source is None else source, resolution, channels=channels)
    except DataError as error:
        if source is not None:
            raise
        raise DataError(
            f"the demo images do not fit this {resolution}x{resolution} model; name images of your own"
        ) from error
    train, test = images.split()
    chosen = {"test": test, "train": train, "all": np.arange(len(images), dtype=np.int64)}[split]
    named = "the demo images" if source is None else str(source)
    if len(chosen) == 0:
        raise DataError(f"{named} has no {SPLITS[split]}; give more images or another --split")
    if limit is not None and limit < len(chosen):  # neighbours in the order of names look alike
        chosen = chosen[np.linspace(0, len(chosen) - 1, limit).round().astype(np.int64)]
    return Selection(images, chosen, split, named)
