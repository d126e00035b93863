"""What an evaluation needs of an exported model, whatever runs it: `hflow_rt.runtime.Session` has it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hflow_rt.data.pixels import to_levels
from hflow_rt.manifest import Manifest

__all__ = ["Session", "Stds", "sample_pixels"]

Stds = float | str | Sequence[str] | Mapping[str, float]


class Session(Protocol):
    """A loaded model."""

    @property
    def resolution(self) -> int:
        """Side of the image."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""

    def run_graph(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of one graph by name; all arrays are float32 `[B, ...]`."""

    def forward(self, latents: Mapping[str, Any], controls: Mapping[str, float] | None = None) -> Any:
        """Latents to images float32 `[B, C, R, R]` in [0, 1]."""

    def draw(
        self, indices: Sequence[int], std: Stds | None = None, seed: int = 0, batch: int = 16
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Prior latents of the images `indices` of `seed`, at most `batch` at a time; std: by default the bundle's."""


def sample_pixels(
    session: Session, indices: range, std: Stds | None, seed: int, controls: Mapping[str, float] | None = None
) -> NDArray[np.uint8]:
    """The images `indices` of `seed`, rounded to 8 bits, `[n, C, R, R]`.

    Raises `DataError` for NaN, and for a wrong std or control.
    """
    parts = session.draw(indices, std, seed, len(indices))
    return to_levels(np.concatenate([session.forward(part, controls) for part in parts]))
