"""What the tests of the page share: a browser, the pixels that it shows, and what Python makes of the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.session import Session

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IN_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
]
Open = Callable[..., Any]
Photo = Callable[..., Path]


def shown(page: Any, canvas: str = "#picture", address: str | None = None) -> Any:
    """The pixels `[R, R, 3]` of a canvas, once it shows what the address says."""
    wanted = page.evaluate("location.hash || '#'") if address is None else address
    if canvas in ("#picture", "#other"):
        page.wait_for_selector(f"{canvas}[data-shows={json.dumps(wanted)}]")
    flat = page.eval_on_selector(
        canvas,
        "one => [one.width, ...one.getContext('2d').getImageData(0, 0, one.width, one.height).data]",
    )
    return np.array(flat[1:], np.uint8).reshape(flat[0], flat[0], 4)[..., :3]


def alone(session: Session, image: int, seed: int = 0, redrawn: dict[str, int] | None = None, **how: Any) -> Any:
    latents = dict(next(session.draw([image], seed=seed, **how)))
    for name, other in (redrawn or {}).items():
        latents[name] = next(session.draw([other], seed=seed, **how))[name]
    return to_uint8(session.forward(latents))[0]


def python_of(page: Any, session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the Python lines on the page make."""
    monkeypatch.chdir(folder)
    exec(page.text_content("#python").replace("MODEL", str(session.bundle.path)), {})
    return np.asarray(Image.open(folder / "picture.png"))
