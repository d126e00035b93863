"""`hflow-rt demo` from nothing to a page, with a few seconds of training."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.slow
def test_demo_writes_a_page_with_pictures(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hflow_rt.cli", "demo", "--minutes", "0.05"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "verified: the engines are the model" in done.stdout
    assert "0.00% of 8-bit values differ" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    page = (run / "demo" / "index.html").read_text()
    names = re.findall(r'<img src="([^"]+)"', page)
    assert names == ["samples.png", "reconstruction.png", "interpolation.png", "interpolation.gif"]
    for name in names:
        with Image.open(run / "demo" / name) as picture:
            assert min(picture.size) >= 96
