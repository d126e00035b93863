"""Distances against their closed forms, and what they are computed from."""

import builtins
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_networks import Counting, expected, selection

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.evaluation.distance import (
    distance_report,
    distances,
    frechet_distance,
    kernel_distance,
    sample_statistics,
)
from hflow_rt.evaluation.statistics import MAX_ROWS, Statistics, statistics
from hflow_rt.runtime import load
from hflow_rt.runtime.images.pictures import to_uint8


def features(n: int, d: int, seed: int, shift: float = 0.0) -> Any:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift).astype(np.float32)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    return Statistics(100, mean, covariance, np.zeros((100, len(mean)), np.float32))


def root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


# the Fréchet distance


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = (x @ x.T + 0.1 * np.eye(6) for x in rng.normal(size=(2, 6, 6)))
    first, second = rng.normal(size=(2, 6))
    cross = root(root(a) @ b @ root(a))
    closed = ((first - second) ** 2).sum() + np.trace(a + b - 2 * cross)
    assert frechet_distance(gaussian(first, a), gaussian(second, b)) == pytest.approx(closed, rel=1e-9)


def test_frechet_of_commuting_gaussians() -> None:
    """|m|^2 + sum (s1 - s2)^2, also where the mean is large beside the deviations."""
    mean, s1, s2 = np.array([1e3, -2.0, 0.0]), np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    found = frechet_distance(gaussian(mean, np.diag(s1**2)), gaussian(mean - 2, np.diag(s2**2)))
    assert found == pytest.approx(12 + 1 + 0 + 6.25, rel=1e-6)


def test_statistics_are_those_of_numpy() -> None:
    values = features(50, 5, 1)
    found = statistics(values, "x")
    np.testing.assert_allclose(found.mean, values.astype(np.float64).mean(0))
    centred = values.astype(np.float64) - found.mean
    np.testing.assert_allclose(found.covariance, centred.T @ centred / 49)
    np.testing.assert_array_equal(found.rows, values)
    one = statistics(features(5, 1, 1), "x")
    assert one.covariance.shape == (1, 1)


def test_only_so_many_rows_are_kept_evenly() -> None:
    values = np.arange(2 * MAX_ROWS + 1, dtype=np.float32)[:, None]
    found = statistics(values, "x")
    assert (found.n, found.rows.shape) == (2 * MAX_ROWS + 1, (MAX_ROWS, 1))
    assert (found.rows[0, 0], found.rows[-1, 0]) == (0, 2 * MAX_ROWS)
    assert found.mean[0] == MAX_ROWS


# the kernel distance


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    """With subsets of everything: off-diagonal means of (x y / D + 1)^3."""
    x, y = features(12, 5, 1).astype(np.float64), features(12, 5, 2, 0.5).astype(np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[(float(u @ v) / 5 + 1) ** 3 for v in b] for u in a])

    off = ~np.eye(12, dtype=bool)
    direct = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    found = kernel_distance(statistics(x, "x"), statistics(y, "y"), subsets=3, subset_size=12)
    assert found.mean == pytest.approx(direct, rel=1e-6)  # rows are float32
    assert found.std == pytest.approx(0, abs=1e-9 * abs(direct))


def test_kernel_distance_has_subsets_of_its_seed() -> None:
    import torch

    x, y = statistics(features(40, 3, 1), "x"), statistics(features(30, 3, 2), "y")
    state = torch.random.get_rng_state()
    first = kernel_distance(x, y, seed=1)
    assert (first.subsets, first.subset_size) == (100, 15)  # half of the smaller side
    assert first.std > 0
    assert kernel_distance(x, y, seed=1) == first
    assert kernel_distance(x, y, seed=2) != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_set_is_at_distance_zero_from_itself() -> None:
    same = statistics(features(60, 8, 3), "x")
    scale = float(np.trace(same.covariance))
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-9 * scale)
    few = statistics(features(5, 8, 3), "x")  # a covariance of rank 4
    assert 0 <= frechet_distance(few, few) < 1e-5 * scale
    other = statistics(features(60, 8, 3, 3.0), "x")
    assert frechet_distance(same, other) == pytest.approx(8 * 9, rel=1e-4)
    unbiased = kernel_distance(same, same)
    assert abs(unbiased.mean) < 3 * unbiased.std
    assert kernel_distance(same, other).mean > 10 * unbiased.std


# what cannot be


def test_bad_sets_are_one_line_each() -> None:
    good = statistics(features(10, 3, 1), "x")
    with pytest.raises(DataError, match="at least 2 images on either side; found 1 of the samples"):
        statistics(features(1, 3, 1), "the samples")
    broken = features(10, 3, 1)
    broken[[2, 5], 1] = np.nan, np.inf
    with pytest.raises(DataError, match="the features of 2 of 10 images of the samples are NaN or infinite"):
        statistics(broken, "the samples")
    with pytest.raises(DataError, match="features must be of one network; found 3 and 4"):
        frechet_distance(good, statistics(features(10, 4, 1), "y"))
    for size in (1, 11):
        with pytest.raises(DataError, match=f"subsets must hold 2 to 10 images, the smaller side; found {size}"):
            kernel_distance(good, good, subset_size=size)


def test_without_torchmetrics_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("torchmetrics"):
            raise ModuleNotFoundError(name, name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    good = statistics(features(10, 3, 1), "x")
    with pytest.raises(BackendUnavailable, match=re.escape("pip install 'hflow-rt[eval]'")):
        frechet_distance(good, good)


# samples against data


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_samples_are_those_of_the_seed_in_eight_bits(tiny_run: Path, backend: str) -> None:
    session, counting = load(tiny_run, backend, "cpu"), Counting()
    found = sample_statistics(counting.network, session, 7, ["0.7"], seed=3, batch=4)
    images = to_uint8(session.sample(7, 0.7, 3)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found.rows, expected(images), rtol=1e-5, atol=1e-3)
    assert (found.n, counting.seen) == (7, 7)


def test_samples_that_are_not_finite_are_refused(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(tiny_run, "onnx", "cpu")
    monkeypatch.setattr(session, "forward", lambda latents, controls: np.full((2, 3, 16, 16), np.nan, np.float32))
    with pytest.raises(DataError, match="pixels must be finite; found NaN or infinity"):
        sample_statistics(Counting().network, session, 2)


def test_shared_work_gives_the_same_bits(tiny_run: Path) -> None:
    """Three processes, one after the other here, each with its share of the batches."""

    class Third:
        def __init__(self, rank: int, log: list[Any]) -> None:
            self.rank, self.log, self.is_main = rank, log, rank == 0

        def share(self, items: Any) -> Any:
            return items[self.rank :: 3]

        def collect(self, results: list[Any]) -> list[Any]:
            self.log.append(results)
            return results

        def any(self, flag: bool) -> bool:
            return flag

    session = load(tiny_run, "onnx", "cpu")
    alone = sample_statistics(Counting().network, session, 11, batch=2)
    shares: list[Any] = []
    for rank in range(3):
        sample_statistics(Counting().network, session, 11, batch=2, shares=Third(rank, shares))
    ordered = [shares[index % 3][index // 3] for index in range(6)]
    np.testing.assert_array_equal(np.concatenate(ordered), alone.rows)


def test_a_report_names_its_features_and_counts_both_sides(tiny_run: Path) -> None:
    session, counting = load(tiny_run, "onnx", "cpu"), Counting()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3, 16, 16), dtype=np.uint8)
    found = distances(counting.network, session, selection(pixels), 6, batch=4)
    assert found is not None
    assert (found.samples, found.data, counting.seen) == (6, 9, 15)
    assert not found.rank_deficient
    dumped = found.dump()
    assert dumped["frechet"]["name"] == "FD (means)"
    assert dumped["features"] == {"name": "means", "sha256": "0" * 64, "dimensions": 4}
    assert dumped["n"] == {"samples": 6, "data": 9}
    data = statistics(expected(pixels).astype(np.float32), "x")
    assert distance_report(counting.network, data, statistics(data.rows[:4], "y")).rank_deficient
    direct = distance_report(counting.network, data, sample_statistics(counting.network, session, 6, batch=4))
    assert direct == found
    assert "held_out" not in dumped["nearest"]
    fresh = distances(counting.network, session, selection(pixels), 6, batch=4, held_out=selection(pixels[2:5]))
    assert fresh is not None
    assert fresh.held_out == pytest.approx((1, 1))  # they are among the data
    assert fresh.dump()["nearest"]["samples"] == dumped["nearest"]["samples"] == found.nearest._asdict()


def test_what_is_wrong_is_said_before_anything_is_computed(tiny_run: Path) -> None:
    session, counting = load(tiny_run, "onnx", "cpu"), Counting()
    pixels = np.zeros((3, 3, 16, 16), np.uint8)
    with pytest.raises(DataError, match="found 1 of the samples"):
        distances(counting.network, session, selection(pixels), 1)
    with pytest.raises(DataError, match="found 1 of 1 training images of somewhere"):
        distances(counting.network, session, selection(pixels[:1], "train"), 5)
    with pytest.raises(DataError, match="std must be a finite number > 0; found 'x'"):
        distances(counting.network, session, selection(pixels), 5, ["x"])
    assert counting.seen == 0
    with pytest.raises(DataError, match="the batch must be at least 1, not 0"):
        distances(counting.network, session, selection(pixels), 5, batch=0)
