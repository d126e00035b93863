"""Files that ship with the package: the demo images."""

from importlib.resources import files
from pathlib import Path

__all__ = ["demo_images"]


def demo_images() -> Path:
    """Path of a zip of 64x64 emoji (`train/`, `test/`; split by emoji family), for a first run without any data.

    Source: Microsoft Fluent emoji, composited on white; evenly spaced 600 of the sorted training names and all
    105 test images of the full set. Licence: MIT, Copyright (c) Microsoft Corporation (`EMOJI-LICENSE.txt` beside
    the zip, `LICENSE.txt` inside).
    """
    return Path(str(files(__name__) / "emoji.zip"))
