"""Distances between two sets of images, here samples and data, in the features of a network.

The Fréchet distance compares mean and covariance and is biased upwards where there are few images; the kernel
distance (squared maximum mean discrepancy with a cubic kernel) is unbiased. Both come from torchmetrics.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hflow_rt.data.selection import Selection
from hflow_rt.errors import DataError
from hflow_rt.evaluation.batches import Alone, Shares, Track, batches, silent
from hflow_rt.evaluation.cache import FeatureCache, cache_key
from hflow_rt.evaluation.coverage import Likeness, likeness, shares_within
from hflow_rt.evaluation.features import FeatureNetwork
from hflow_rt.evaluation.session import Session, Stds, sample_pixels
from hflow_rt.evaluation.statistics import Statistics, need_two, statistics
from hflow_rt.extras import needed

__all__ = [
    "DistanceReport",
    "KernelDistance",
    "data_statistics",
    "distance_report",
    "distances",
    "frechet_distance",
    "kernel_distance",
    "sample_statistics",
]

SUBSETS = 100
SUBSET_SIZE = 1000  # where there are twice as many images
# The one process that computes a distance has the features of all; metrics would wait for the others.
_HERE: dict[str, Any] = {"sync_on_compute": False}


class KernelDistance(NamedTuple):
    """Mean and standard deviation over `subsets` random subsets of `subset_size` images of both sides."""

    mean: float
    std: float
    subsets: int
    subset_size: int


@dataclass(frozen=True)
class DistanceReport:
    """Both distances in the features of `network`, from `samples` samples and `data` images, and how like they are.

    `nearest` and `coverage` are of the rows that `Statistics` keep of either side.
    """

    frechet_name: str
    frechet: float
    kernel_name: str
    kernel: KernelDistance
    network: str
    network_sha256: str
    dimensions: int
    samples: int
    data: int
    nearest: Likeness
    coverage: tuple[float, float] | None = None  # precision and recall, see `shares_within`
    held_out: Likeness | None = None  # of images that are not among the data

    @property
    def rank_deficient(self) -> bool:
        """Whether a covariance has fewer images than dimensions behind it, which biases the Fréchet distance."""
        return min(self.samples, self.data) <= self.dimensions

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "frechet": {"name": self.frechet_name, "value": self.frechet, "rank_deficient": self.rank_deficient},
            "kernel": {"name": self.kernel_name, **self.kernel._asdict()},
            "features": {"name": self.network, "sha256": self.network_sha256, "dimensions": self.dimensions},
            "n": {"samples": self.samples, "data": self.data},
            "nearest": {
                "samples": self.nearest._asdict(),
                **({} if self.held_out is None else {"held_out": self.held_out._asdict()}),
            },
            **({} if self.coverage is None else dict(zip(("precision", "recall"), self.coverage, strict=True))),
        }


def distances(
    network: FeatureNetwork,
    session: Session,
    data: Selection,
    count: int,
    std: Stds | None = None,
    seed: int = 0,
    batch: int = 32,
    cache: FeatureCache | None = None,
    shares: Shares | None = None,
    track: Track = silent,
    controls: Mapping[str, float] | None = None,
    held_out: Selection | None = None,
) -> DistanceReport | None:
    """Both distances between `count` samples of `seed` and the data; None in all processes but the main one.

    std: by default what the bundle says. controls: as of `Session.forward`. held_out: images that are not among the
    data; how like the data these are is told beside the samples. The same however many processes share the work. Raises
    `DataError` for too few images, a wrong std or control, or features that are not finite, and `BackendUnavailable`
    without torchmetrics.
    """
    need_two(count, "the samples")
    need_two(len(data), str(data))
    sample_pixels(session, range(1), std, seed, controls)  # are they right?
    _metrics()
    shares = shares or Alone()
    of_data = data_statistics(network, data, batch, cache, shares, track)
    of_samples = sample_statistics(network, session, count, std, seed, batch, shares, track, controls)
    fresh = None if held_out is None else data_statistics(network, held_out, batch, cache, shares, track)
    if of_data is None or not shares.is_main:
        return None
    return distance_report(network, of_data, of_samples, seed, fresh)


def data_statistics(
    network: FeatureNetwork,
    data: Selection,
    batch: int = 32,
    cache: FeatureCache | None = None,
    shares: Shares | None = None,
    track: Track = silent,
) -> Statistics | None:
    """Of a selection of images, from the cache where it has them: then None in all processes but the main one."""
    shares = shares or Alone()
    key = cache_key(data.images.hash, data.split, len(data), data.images.resolution, network.key)
    found = cache.load(key) if cache is not None and shares.is_main else None
    if shares.any(found is not None):
        return found
    mine = [network(data.pixels(part)) for part in track("data", shares.share(batches(len(data), batch)))]
    found = statistics(_joined(shares.collect(mine)), str(data))
    if cache is not None and shares.is_main:
        cache.save(key, found)
    return found


def sample_statistics(
    network: FeatureNetwork,
    session: Session,
    count: int,
    std: Stds | None = None,
    seed: int = 0,
    batch: int = 32,
    shares: Shares | None = None,
    track: Track = silent,
    controls: Mapping[str, float] | None = None,
) -> Statistics:
    """Of the images 0 .. count - 1 of `seed`, rounded to 8 bits as the data are. Raises `DataError`."""
    shares = shares or Alone()
    parts = track("samples", shares.share(batches(count, batch)))
    mine = [network(sample_pixels(session, part, std, seed, controls)) for part in parts]
    return statistics(_joined(shares.collect(mine)), "the samples")


def distance_report(
    network: FeatureNetwork, data: Statistics, samples: Statistics, seed: int = 0, held_out: Statistics | None = None
) -> DistanceReport:
    """Both distances; `seed` picks the subsets. Raises `BackendUnavailable` without torchmetrics."""
    return DistanceReport(
        frechet_name=network.frechet,
        frechet=frechet_distance(data, samples),
        kernel_name=network.kernel,
        kernel=kernel_distance(data, samples, seed=seed),
        network=network.name,
        network_sha256=network.sha256,
        dimensions=network.dimensions,
        samples=samples.n,
        data=data.n,
        nearest=likeness(data.rows, samples.rows),
        coverage=shares_within(data.rows, samples.rows),
        held_out=None if held_out is None else likeness(data.rows, held_out.rows),
    )


def frechet_distance(data: Statistics, samples: Statistics) -> float:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, in float64."""
    _same_features(data, samples)
    metric = _metrics()[0](_Given(data.dimensions), normalize=True, **_HERE)
    for side, real in ((data, True), (samples, False)):
        metric.update(torch.empty(0, side.dimensions, dtype=torch.float64), real)  # counts as seen, adds nothing
        mean = torch.from_numpy(side.mean)
        name = "real" if real else "fake"
        setattr(metric, f"{name}_features_sum", side.n * mean)
        squares = torch.from_numpy(side.covariance) * (side.n - 1) + side.n * torch.outer(mean, mean)
        setattr(metric, f"{name}_features_cov_sum", squares)
        setattr(metric, f"{name}_features_num_samples", torch.tensor(side.n))
    found = float(metric.compute())
    return 0.0 if found < 0 else found  # rounding, for sets that are the same


def kernel_distance(
    data: Statistics, samples: Statistics, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy with the kernel `(x y / D + 1)^3`, in float64.

    Subsets hold at most half of the smaller side, so that their deviation says something. Deterministic in `seed`;
    raises `DataError` for subsets larger than a side or of fewer than two images.
    """
    _same_features(data, samples)
    smaller = min(len(data.rows), len(samples.rows))
    size = max(2, min(SUBSET_SIZE, smaller // 2)) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise DataError(f"subsets must hold 2 to {smaller} images, the smaller side; found {size}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # it keeps all features in memory, as we do
        metric = _metrics()[1](_Given(data.dimensions), subsets=subsets, subset_size=size, **_HERE)
        metric.update(torch.from_numpy(data.rows).double(), real=True)
        metric.update(torch.from_numpy(samples.rows).double(), real=False)
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return KernelDistance(float(mean), float(std), subsets, size)


class _Given(nn.Module):
    """In the place of a metric's network: the features are there already."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metrics() -> tuple[Any, Any]:
    """The classes of both distances, which bear the name of the one network they come with."""
    with needed("torchmetrics", "distances need torchmetrics: pip install 'hflow-rt[eval]'"):
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    return FrechetInceptionDistance, KernelInceptionDistance


def _same_features(data: Statistics, samples: Statistics) -> None:
    if data.dimensions != samples.dimensions:
        raise DataError(f"features must be of one network; found {data.dimensions} and {samples.dimensions} an image")


def _joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
