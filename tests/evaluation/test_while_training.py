"""Distances of a model without likelihood while it trains."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_networks import Counting, expected

from hflow_rt.errors import BackendUnavailable
from hflow_rt.evaluation import while_training
from hflow_rt.evaluation.distance import distance_report
from hflow_rt.evaluation.figures import Evaluation
from hflow_rt.evaluation.statistics import statistics
from hflow_rt.evaluation.while_training import Distances

RNG = np.random.default_rng(0)
DATA, SAMPLES = (RNG.integers(0, 256, (count, 3, 8, 8), np.uint8) for count in (70, 40))


def test_the_same_data_is_compared_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Counting()
    monkeypatch.setattr(while_training, "open_features", lambda *_: network.network)
    monkeypatch.setattr(while_training, "_MOST_DATA", 36)
    distances = Distances(lambda numbers: DATA[numbers], len(DATA), torch.device("cpu"))

    def samples() -> Iterator[np.ndarray]:
        yield SAMPLES[:30]
        yield SAMPLES[30:]

    chosen = np.linspace(0, 69, 36).round().astype(int)
    whole = (statistics(expected(of).astype(np.float32), "") for of in (DATA[chosen], SAMPLES))
    report = distance_report(network.network, *whole)
    for images in (0, 100):
        found = distances.evaluate(samples(), images)
        assert (found.images, found.of, found.reason) == (images, "samples", None)
        assert found.figures["frechet"].title == "FD (means)"
        assert found.figures["frechet"].estimate.mean == pytest.approx(report.frechet)
        assert found.figures["kernel"].estimate.mean == pytest.approx(report.kernel.mean)
        assert found.quoted is not None
        assert found.quoted.estimate.n == 40
        assert Evaluation.load(found.dump()).dump() == found.dump()
    assert network.seen == 36 + 2 * 40


def test_what_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = Distances(lambda numbers: DATA[numbers], len(DATA), torch.device("cpu"))

    def absent(*_: object) -> None:
        raise BackendUnavailable("needs a package")

    monkeypatch.setattr(while_training, "open_features", absent)
    assert distances.evaluate(iter([SAMPLES]), 7) == Evaluation(7, reason="needs a package", of="samples")
