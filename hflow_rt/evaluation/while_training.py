"""Distances of a model that is still training: the same seeds again and again, against the same training images.

They stand where a family has no likelihood. What is not there, such as a package, is a reason and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.evaluation.batches import batches
from hflow_rt.evaluation.distance import distance_report
from hflow_rt.evaluation.features import EFFICIENTNET, FeatureNetwork, open_features
from hflow_rt.evaluation.figures import Estimate, Evaluation, Figure
from hflow_rt.evaluation.statistics import Statistics, statistics

__all__ = ["Distances"]

Pixels = NDArray[np.uint8]

_BATCH = 32
_MOST_DATA = 1000  # training images: their features take seconds on a CPU, once


class Distances:
    """Fréchet and kernel distance in the features of `EFFICIENTNET`."""

    def __init__(self, read: Callable[[NDArray[np.int64]], Pixels], images: int, device: torch.device) -> None:
        """read: some of `images` training images, `[n, C, R, R]`, by number; `_MOST_DATA` at most are read, once."""
        self._chosen = np.linspace(0, images - 1, min(images, _MOST_DATA)).round().astype(np.int64)
        self._read, self._device = read, device
        self._known: tuple[FeatureNetwork, Statistics] | None = None

    def evaluate(self, samples: Iterator[Pixels], images: int) -> Evaluation:
        """Both distances of samples, in batches `[n, C, R, R]`, from the data, after `images` training images."""
        try:
            network, data = self._data()
            found = statistics(np.concatenate([network(part) for part in samples]), "the samples")
            report = distance_report(network, data, found)
        except (BackendUnavailable, DataError) as error:
            return Evaluation(images, reason=str(error), of="samples")
        figures = {
            "frechet": Figure(report.frechet_name, Estimate(report.frechet, np.nan, found.n)),
            "kernel": Figure(report.kernel_name, Estimate(report.kernel.mean, np.nan, found.n)),
        }
        return Evaluation(images, figures, of="samples")

    def _data(self) -> tuple[FeatureNetwork, Statistics]:
        if self._known is None:
            parts = [self._chosen[part.start : part.stop] for part in batches(len(self._chosen), _BATCH)]
            network = open_features(EFFICIENTNET, self._read(parts[0][:1]).shape[-1], self._device)
            features = np.concatenate([network(self._read(part)) for part in parts])
            self._known = network, statistics(features, "the training images")
        return self._known
