"""Files that ship with the package: images for a first run, and a trained model."""

from importlib.resources import files
from pathlib import Path

__all__ = ["PRETRAINED", "demo_images", "pretrained"]

PRETRAINED = "hflow-emoji"


def demo_images() -> Path:
    """Path of a zip of 64x64 emoji (`train/`, `test/`; split by emoji family), for a first run without data.

    Source: Microsoft Fluent emoji, composited on white: 600 training images, evenly spaced in the sorted
    names of the full set's 3157, and all 105 test images. Licence: MIT, Copyright (c) Microsoft Corporation
    (`EMOJI-LICENSE.txt` beside the zip, `LICENSE.txt` inside).
    """
    return Path(str(files(__name__) / "emoji.zip"))


def pretrained() -> Path:
    """The bundle of the bundled model, which draws 64x64 emoji; `hflow-emoji.md` beside it says what it is.

    >>> import hflow_rt
    >>> hflow_rt.pretrained().name
    'hflow-emoji'
    """
    return Path(str(files(__name__) / PRETRAINED))
