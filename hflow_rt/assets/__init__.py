"""Files that ship with the package: images for a first run, and trained models."""

from importlib.resources import files
from pathlib import Path

from hflow_rt.errors import ConfigError

__all__ = ["PRETRAINED", "bundled_models", "demo_images", "is_installed", "pretrained", "resolved"]

PRETRAINED = "ihdm-emoji"
_HERE = Path(str(files(__name__)))


def demo_images() -> Path:
    """Path of a zip of 64x64 emoji (`train/`, `test/`; split by emoji family), for a first run without data.

    Source: Microsoft Fluent emoji, composited on white: 600 training images, evenly spaced in the sorted
    names of the full set's 3157, and all 105 test images. Licence: MIT, Copyright (c) Microsoft Corporation
    (`EMOJI-LICENSE.txt` beside the zip, `LICENSE.txt` inside).
    """
    return _HERE / "emoji.zip"


def bundled_models() -> tuple[str, ...]:
    """Names of the trained models that ship, sorted; each is a bundle with a card `NAME.md` beside it."""
    return tuple(sorted(path.parent.name for path in _HERE.glob("*/manifest.json")))


def pretrained(name: str = PRETRAINED) -> Path:
    """The bundle of a bundled model, all of which draw 64x64 emoji; its card beside it says what it is.

    Raises `ConfigError` for a name that none has.

    >>> import hflow_rt
    >>> hflow_rt.pretrained().name
    'ihdm-emoji'
    >>> hflow_rt.load(hflow_rt.pretrained("hflow-emoji")).steps
    1
    """
    known = bundled_models()
    if name not in known:
        raise ConfigError(f"no bundled model is called '{name}'; the bundled models are {', '.join(known)}")
    return _HERE / name


def resolved(path: Path) -> Path:
    """`path`, or the bundle of the bundled model that is called so where there is no file or folder of that name."""
    return _HERE / path if str(path) in bundled_models() and not path.exists() else path


def is_installed(folder: Path) -> bool:
    """Whether a folder is the bundle of a bundled model, which is not ours to write to."""
    return folder.resolve().parent == _HERE.resolve() and folder.name in bundled_models()
