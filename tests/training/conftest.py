"""The toy family, registered, and 45 images for it."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hflow_rt.models.registry import FAMILIES

sys.path.insert(0, str(Path(__file__).parent))  # toy_family is found by name, also by the processes tests start


class ToyImages:
    """`count` random images, the last fifth held out."""

    def __init__(self, count: int = 45, side: int = 8, seed: int = 0) -> None:
        self.array = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), np.uint8)
        self.names = [f"{index:04d}.png" for index in range(count)]
        self.hash = hashlib.sha256(self.array.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, indices: NDArray[np.integer]) -> NDArray[np.uint8]:
        return self.array[indices]

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        trained_on = len(self) - len(self) // 5
        return np.arange(trained_on), np.arange(trained_on, len(self))


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", "toy_family")


@pytest.fixture
def images() -> ToyImages:
    return ToyImages()


@pytest.fixture
def make_images() -> Callable[..., ToyImages]:
    return ToyImages
