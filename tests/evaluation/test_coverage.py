"""Precision and recall of samples, and whether they are copies."""

import numpy as np
import pytest

from hflow_rt.evaluation.coverage import likeness, shares_within


def test_samples_of_a_part_of_the_data() -> None:
    """Every sample looks like data of one of two kinds, and covers nothing of the other."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(2, 60, 4)).astype(np.float32) + np.array([0, 100], np.float32)[:, None, None]
    data = kinds.reshape(120, 4)
    assert shares_within(data, data.copy()) == (1, 1)
    precision, recall = shares_within(data, kinds[0, :50]) or (0, 0)
    assert precision == 1
    assert recall == pytest.approx(0.5, abs=0.05)
    assert shares_within(kinds[0], kinds[1]) == (0, 0)


def test_balls_reach_to_the_third_neighbour() -> None:
    data = np.array([[0], [1], [3], [6], [10]], np.float32)  # third neighbours at 6, 5, 3, 5 and 9
    samples = np.array([[-6], [-6.5], [19.5], [19], [5]], np.float32)
    precision, _ = shares_within(data, samples) or (None, None)
    assert precision == pytest.approx(3 / 5)
    assert shares_within(data[:4], samples) is None


def test_a_copy_is_at_one() -> None:
    data = np.array([[3, 0], [0, 2]], np.float32)
    assert likeness(data, data[1:] * 5) == (1, 1)
    found = likeness(data, np.array([[1, 1], [4, 3], [-1, 0]], np.float32))
    assert found == pytest.approx((0.5**0.5, 0.8))
    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=(n, 7)).astype(np.float32) for n in (40, 1100))
    exact = (other / np.linalg.norm(other, axis=1)[:, None]) @ (one / np.linalg.norm(one, axis=1)[:, None]).T
    assert likeness(one, other).largest == pytest.approx(exact.max(), rel=1e-5)
    assert likeness(one, other).median == pytest.approx(np.median(exact.max(1)), rel=1e-5)
