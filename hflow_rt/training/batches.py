"""Which images a micro-batch sees and every random number it needs, as a function of its place in the run.

Nothing here keeps a random state: a draw depends on (seed, step, micro-batch, process, phase) alone and is made
on the CPU. So a resumed run needs no state, and a run sees the same noise on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.models.family import conditions_by_folder
from hflow_rt.models.plan import Batch, Place, TrainingPlan, draw
from hflow_rt.streams import generator
from hflow_rt.training.config import TrainingConfig
from hflow_rt.training.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Images", "MicroBatches", "Shuffle"]


@runtime_checkable
class Images(Protocol):
    """What training needs of a dataset, such as `hflow_rt.data.dataset.ImageSet`; `hash` tells sets apart."""

    names: list[str]
    hash: str

    def __len__(self) -> int: ...

    def pixels(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """uint8 `[n, C, R, R]`."""
        ...

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices to train on, and held out."""
        ...


class Shuffle:
    """The endless stream of training images: one permutation after another, each seeded by its epoch.

    Batches are cut from the stream wherever they fall, so no image is dropped at the end of an epoch, and
    processes that take neighbouring pieces never share one within it.
    """

    def __init__(self, indices: NDArray[np.int64], seed: int) -> None:
        self._indices = indices
        self._seed = seed
        self._epoch = -1
        self._order = indices

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Dataset indices of the images at places `start` .. `start + count` of the stream."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, len(self._indices))
            part = self._epoch_order(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._indices))
            self._epoch, self._order = epoch, self._indices[order]
        return self._order


class MicroBatches:
    """Makes micro-batches, with a GPU one ahead of need in a thread of its own."""

    def __init__(
        self,
        plan: TrainingPlan,
        data: Images,
        indices: NDArray[np.int64],
        config: TrainingConfig,
        processes: Processes,
    ) -> None:
        self._plan, self._data, self._config, self._processes = plan, data, config, processes
        self._phases = plan.phases()
        self._shuffle = Shuffle(indices, config.seed)
        # On a CPU the thread would only take the cores from the training itself.
        self._thread = ThreadPoolExecutor(1) if processes.device.type == "cuda" else None
        self._ahead: tuple[tuple[Place, int, int], Future[Batch]] | None = None

    @property
    def step_images(self) -> int:
        """Images of one step, over all processes."""
        return self._config.batch_size * self._config.accumulate * self._processes.count

    def after(self, place: Place) -> Place:
        """Where the step that starts at `place` ends."""
        return Place(place.step + 1, place.images + self.step_images, place.total)

    def get(self, place: Place, micro: int, phase: int = 0) -> Batch:
        """Micro-batch `micro` of phase number `phase` of the step that starts at `place`, on the device."""
        if self._thread is None:
            return self._make(place, micro, phase)
        key = (place, micro, phase)
        batch = self._ahead[1].result() if self._ahead and self._ahead[0] == key else self._make(*key)
        following = self._following(*key)
        self._ahead = following, self._thread.submit(self._make, *following)
        draws, conditions = (
            {name: self._move(value) for name, value in values.items()} for values in (batch.draws, batch.conditions)
        )
        return Batch(self._move(batch.pixels), draws, conditions)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _following(self, place: Place, micro: int, phase: int) -> tuple[Place, int, int]:
        if micro + 1 < self._config.accumulate:
            return place, micro + 1, phase
        due = [later for later in range(phase + 1, len(self._phases)) if place.step % self._phases[later].every == 0]
        return (place, 0, due[0]) if due else (self.after(place), 0, 0)

    def _make(self, place: Place, micro: int, phase: int) -> Batch:
        config, rank = self._config, self._processes.rank
        size = config.batch_size
        draws = generator(config.seed, place.step, micro, rank)
        start = place.images + (micro * self._processes.count + rank) * size
        chosen = self._shuffle.take(start, size)
        pixels = torch.from_numpy(self._data.pixels(chosen))  # [B, C, R, R]
        if config.flip:
            mirrored = torch.rand(size, generator=draws) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        if phase:  # the first goes on with the stream of the flips, as it did when it was the only one
            draws = generator(config.seed, place.step, micro, rank, phase)
        drawn = draw(self._plan.draws(self._phases[phase].name), size, draws)
        conditions = conditions_by_folder(self._plan.model, [self._data.names[index] for index in chosen])
        if self._thread is not None:
            pixels, drawn = pixels.pin_memory(), {name: value.pin_memory() for name, value in drawn.items()}
            conditions = {name: value.pin_memory() for name, value in conditions.items()}
        return Batch(pixels, drawn, conditions)

    def _move(self, value: Tensor) -> Tensor:
        return value.to(self._processes.device, non_blocking=True)
