"""What a run tells people while it runs: a mean over recent steps, TensorBoard, progress for a callback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from hflow_rt.evaluation.figures import BITS, Evaluation

__all__ = ["Log", "Meter", "Progress"]


@dataclass(frozen=True)
class Progress:
    """Handed to `on_progress` after every step, and with an `evaluation` after each of these.

    loss: of the plan's first phase. bits_per_dim: the published bound on recent training batches; NaN where that phase
    tells none. seconds_left: None while nobody can tell. warning: with an evaluation, what goes wrong and what to do.
    """

    step: int
    images: int
    total_images: int
    images_per_second: float
    seconds_left: float | None
    loss: float
    bits_per_dim: float
    evaluation: Evaluation | None = None
    warning: str | None = None


class Meter:
    """Means over the steps since the last `reset`, and the rate of training over the whole session."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.reset()

    def add(self, values: Mapping[str, float], images: int, seconds: float) -> None:
        """Count one step."""
        self.images += images
        self.seconds += seconds
        self._images += images
        self._seconds += seconds
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def means(self) -> dict[str, float]:
        """Mean of every value since the reset, over the steps that had it."""
        return {name: total / count for name, (total, count) in self._sums.items()}

    @property
    def recent_rate(self) -> float:
        """Images per second since the reset."""
        return self._images / max(self._seconds, 1e-9)

    @property
    def rate(self) -> float:
        """Images per second of the session, without evaluations and checkpoints."""
        return self.images / self.seconds if self.seconds else 0.0

    def reset(self) -> None:
        """Start new means."""
        self._sums: dict[str, tuple[float, int]] = {}
        self._images, self._seconds = 0, 0.0


class Log:
    """TensorBoard files; the x-axis is images seen. On a process that does not write, nothing happens."""

    def __init__(self, folder: Path, images: int, writes: bool) -> None:
        # Events after the place a run is resumed at belong to a future that will not happen; those at it have happened.
        ends = images + 1 if images else None
        self._writer = SummaryWriter(str(folder), purge_step=ends, flush_secs=20) if writes else None

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        """Add points to curves, by tag."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, images)

    def evaluation(self, found: Evaluation) -> None:
        """Add what an evaluation found."""
        of = found.of.replace("-", "_")
        starts = {BITS: f"bits_per_dim/{of}_"}
        tags = {
            f"{starts.get(figure.unit, f'{of}/')}{name}": figure.estimate.mean for name, figure in found.figures.items()
        }
        self.scalars(tags, found.images)

    def warning(self, line: str, images: int) -> None:
        """Add a line of text."""
        if self._writer is not None:
            self._writer.add_text("warning", line, images)

    def picture(self, image: NDArray[np.uint8], images: int) -> None:
        """Add a picture `[H, W, 3]`."""
        if self._writer is not None:
            self._writer.add_image("samples", image, images, dataformats="HWC")

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()
