"""The tiny model in mixed precision, exported once."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny_mixed(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified bundle with the graph `bound`. Copy it before changing anything."""
    from hflow_rt.export.bundle import export_bundle

    images = np.random.default_rng(0).uniform(0, 1, (3, 3, 16, 16)).astype(np.float32)
    folder = tmp_path_factory.mktemp("mixed") / "bundle"
    manifest = export_bundle(tiny_run / "model.safetensors", folder, images, bound=True, precision="mixed")
    assert manifest.verified, manifest.parity
    return folder
