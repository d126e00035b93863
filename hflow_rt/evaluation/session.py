"""What an evaluation needs of an exported model, whatever runs it: `hflow_rt.runtime.Session` has it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError

__all__ = ["Encoded", "Session", "Stds", "sample_pixels"]

Stds = float | str | Sequence[str] | Mapping[str, float]


class Encoded(Protocol):
    """What `inverse` yields."""

    @property
    def log_prob(self) -> Any:
        """`[B]`, nats."""


class Session(Protocol):
    """A loaded model."""

    @property
    def resolution(self) -> int:
        """Side of the image."""

    @property
    def bits(self) -> int:
        """Bits of the data it was trained on."""

    def bits_per_dim(self, log_prob: Any) -> Any:
        """Log-probabilities in nats as bits per dimension."""

    def inverse(self, images: Any) -> Encoded:
        """Images float32 `[B, 3, R, R]` in [0, 1] to latents and log-probability."""

    def forward(self, latents: Mapping[str, Any]) -> Any:
        """Latents to images float32 `[B, 3, R, R]` in [0, 1]."""

    def draw(
        self, indices: Sequence[int], std: Stds = 1.0, seed: int = 0, batch: int = 16
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Prior latents of the images `indices` of `seed`, at most `batch` at a time."""


def sample_pixels(session: Session, indices: range, std: Stds, seed: int) -> NDArray[np.uint8]:
    """The images `indices` of `seed`, rounded to 8 bits, `[n, 3, R, R]`. Raises `DataError` for NaN and a wrong std."""
    images = np.concatenate([session.forward(part) for part in session.draw(indices, std, seed, len(indices))])
    if not np.isfinite(images).all():
        raise DataError("pixels must be finite; found NaN or infinity; lower the std or check the model")
    levels: NDArray[np.uint8] = np.rint(np.clip(images, 0, 1) * np.float32(255)).astype(np.uint8)
    return levels
