"""A server of the bundled model, and pictures to give it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hflow_rt.export.bundle import export_bundle
from hflow_rt.models.checkpoint import save_model
from hflow_rt.models.registry import Family, family
from hflow_rt.runtime import load
from hflow_rt.runtime.session import Session

sys.path.insert(0, str(Path(__file__).parent))  # what tests share is found by name


@pytest.fixture(scope="session")
def session() -> Session:
    return load(device="cpu")


@pytest.fixture(scope="session")
def slotted(tiny: Callable[[Family], Any], tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A model of one latent without an inverse, whose layers have values of their own."""
    folder = tmp_path_factory.mktemp("slotted")
    made = tiny(family("inrgan"))
    save_model(folder / "model.safetensors", "inrgan", made, made.state_dict(), {"images": 0})
    export_bundle(folder / "model.safetensors", folder / "bundle", np.zeros((1, 3, 16, 16), np.float32))
    return load(folder / "bundle", device="cpu")


@pytest.fixture(scope="session")
def port(session: Session) -> Iterator[int]:
    from explore_server import running

    with running(session) as found:
        yield found


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A picture of its own name and seed, larger than the model's."""
    folder = tmp_path_factory.mktemp("photos")

    def make(name: str, seed: int = 0, side: int = 100) -> Path:
        corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
        Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
        return folder / name

    return make
