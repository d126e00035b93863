"""A server of the bundled model, and pictures to give it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hflow_rt.runtime import load
from hflow_rt.runtime.session import Session

sys.path.insert(0, str(Path(__file__).parent))  # what tests share is found by name


@pytest.fixture(scope="session")
def session() -> Session:
    return load(device="cpu")


@pytest.fixture(scope="session")
def slotted(slots_run: Path) -> Session:
    """A model of one latent without an inverse, whose layers have values of their own."""
    return load(slots_run, device="cpu")


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
