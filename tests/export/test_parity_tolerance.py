"""The tolerance of the proof: what it allows, what it never does, and a short version of `benchmarks/parity_study.py`.

A proof that calls a right engine wrong is the kind of issue "The proof that cries wolf".
"""

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hflow_rt.export.bundle import check_bundle
from hflow_rt.export.judging import compare, failures, set_tolerances
from hflow_rt.runtime.bundle import find_bundle

torch = pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXACT = np.random.default_rng(0).normal(size=10_000)
ROUNDED = EXACT.astype(np.float32)
ULP = 2.0**-23
IMAGES = np.random.default_rng(0).uniform(0, 1, (3, 3, 16, 16)).astype(np.float32)


def judged(found: Any, exact: Any = EXACT, plain: Any = ROUNDED) -> dict[str, Any]:
    """A report of one output whose engine found `found`, with its tolerances."""
    report = {"graphs": {}, "pooled": {"inverse": {"z0": compare(found, exact, plain)}}}
    set_tolerances(report)
    json.dumps(report, allow_nan=False)
    return report


def test_tolerances_are_factors_of_torch_float32_and_the_rounding_of_the_output() -> None:
    exact, plain = np.array([1.0, -2.0]), np.array([1.0, -2.0 + 3e-6], np.float32)
    (entry,) = judged(plain, exact, plain)["pooled"]["inverse"].values()
    own = float(plain[1]) + 2
    assert entry["torch_float32_rms"] == pytest.approx(own / 2**0.5)
    assert entry["rms"] == entry["torch_float32_rms"]
    assert entry["tolerance"] == {
        "rms": pytest.approx(8 * own / 2**0.5 + 8 * ULP * 2.5**0.5),
        "max": pytest.approx(12 * own + 8 * ULP * 2),
    }  # a quantile of so few values would be their maximum


def test_torch_that_is_exact_by_luck_does_not_make_an_engine_wrong() -> None:
    """proof_that_cries_wolf: few values, of which torch met every one."""
    exact = np.array([-1500.0, -1499.0, -1498.0])
    plain = exact.astype(np.float32)
    assert failures(judged(plain + np.float32(1500 * 2 * ULP), exact, plain)) == []
    (line,) = failures(judged(plain + np.float32(1500 * 20 * ULP), exact, plain))
    assert line == "inverse.z0: error rms 0.00354 above 0.00143, max 0.00354 above 0.00143"


def test_many_values_that_are_a_little_off_fail_where_the_largest_does_not() -> None:
    plain = ROUNDED.copy()
    plain[0] += 1e-4  # torch's largest error is far above the others
    (line,) = failures(judged(plain + np.float32(8e-6), EXACT, plain))
    assert line == "inverse.z0: error rms 8.07e-06 above 4.95e-06, p99.9 8.22e-06 above 3.51e-06"


def test_one_value_that_is_far_off_fails_where_the_others_do_not() -> None:
    found = ROUNDED.copy()
    found[7] += np.float32(1e-5)
    (line,) = failures(judged(found))
    assert line.startswith("inverse.z0: error max 1e-05 above ")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (np.nan, "inverse.z0: 1 NaN"),
        (np.inf, "inverse.z0: error rms 1e+28 above"),
        (-np.inf, "inverse.z0: error rms 1e+28 above"),
    ],
)
def test_an_engine_that_is_not_finite_fails(value: float, line: str) -> None:
    found = ROUNDED.copy()
    found[3] = value
    (said,) = failures(judged(found))
    assert said.startswith(line)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_torch_that_is_not_finite_proves_nothing(value: float) -> None:
    plain = ROUNDED.copy()
    plain[3] = value
    for found in (ROUNDED, plain):
        (line,) = failures(judged(found, EXACT, plain))
        assert "NaN" in line or line == "inverse.z0: not conclusive, torch float32 itself is off by 1e+30"


@pytest.mark.parametrize("pooled", [{}, {"forward": {}}])
def test_comparing_nothing_fails(pooled: dict[str, Any]) -> None:
    assert failures({"graphs": {}, "pooled": pooled}) == ["nothing was compared: the bundle has neither route"]


# the study, in short


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("parity_study")


def test_right_engines_of_little_trained_models_are_called_right(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"resolution": 8, "levels": 1, "steps": 2, "hidden_channels": 8, "lu": True}
    monkeypatch.setitem(study.KINDS, "glow-8", ("glow-demo", settings, 6))
    for index in (1, 5):  # odd ones get no faults
        record = study.study(study.Subject("glow-8", index), tmp_path)
        set_tolerances(record["right"])
        assert failures(record["right"]) == []
        assert record["steps"] > 0
        assert record["faults"] == {}


def test_every_fault_is_found(study: ModuleType, tiny_run: Path, tiny_model: Any, tmp_path: Path) -> None:
    found = []
    for name, change in study.faults(tiny_model, IMAGES, 0):
        run = shutil.copytree(tiny_run, tmp_path / name)
        effect = change(run / "bundle")
        assert effect is not None, name
        study.trusted(run / "bundle")
        assert check_bundle(find_bundle(run), IMAGES, "onnx", "cpu")["failures"], name
        found.append(name)
    assert found == [
        "a step left out", "two channels swapped", "a constant off by 1e-4", "epsilon in every actnorm",
        "epsilon outside the root", "epsilon ten times as large", "TF32",
    ]  # fmt: skip
