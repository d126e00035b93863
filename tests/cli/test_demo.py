"""`hflow-rt demo` from nothing to a page, with the smallest of families in place of the default preset."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hflow_rt.models import registry


def test_demo_writes_a_page_with_pictures(
    hflow: Callable[..., Any], docs_family: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hflow_rt.cli.demo._SHIPPED", 2)
    monkeypatch.setitem(registry.FAMILIES, "colour", "family_of_the_docs")
    monkeypatch.setattr(registry, "DEFAULT_PRESET", "colour")
    monkeypatch.chdir(tmp_path)
    done = hflow("demo", "--minutes", "0.02")
    assert done.code == 0, done.err
    assert "verified: the engines are the model" in done.out
    assert "0.00% of 8-bit values differ" in done.out
    (run,) = (tmp_path / "runs").iterdir()
    page = (run / "demo" / "index.html").read_text()
    names = re.findall(r'<img src="([^"]+)"', page)
    assert names == ["bundled.png", "samples.png", "reconstruction.png", "interpolation.png", "interpolation.gif"]
    for name in names:
        with Image.open(run / "demo" / name) as picture:
            assert min(picture.size) >= 64
