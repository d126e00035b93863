"""What tests of commands share: how a command ended, and what it left."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# a process started in the background by a script ignores SIGINT, and so do its children
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hflow_rt.cli.__main__ import main
main()
"""


def ok(result: Any) -> Any:
    """The result of a command that must succeed."""
    assert result.code == 0, result.err
    return result


def refused(result: Any, *parts: str) -> None:
    """The command exited 1 with one error line, its last, that holds `parts`."""
    assert result.code == 1, result.out + result.err
    *before, last = result.err.splitlines()
    assert last.startswith("error: ")
    for part in parts:
        assert part in last
    assert not any("error" in line or "Traceback" in line for line in before)
    assert "next:" not in result.out


def tree(folder: Path | str = ".") -> set[str]:
    """Every file and folder there, hidden ones as well."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


def pixels(path: Path | str) -> np.ndarray:
    """A picture as uint8 `[H, W, 3]`."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
