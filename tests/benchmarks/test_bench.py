"""Latency reports: the figures, what they warn of, what they look like, and variants that fail."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hflow_rt.bench import measure as measuring
from hflow_rt.bench.floor import Work, count, floor_seconds
from hflow_rt.bench.measure import measure_latency, statistics_of, warnings_of
from hflow_rt.bench.report import chart, compare, markdown, ratios, read_report
from hflow_rt.bench.variants import BASELINE, VARIANTS, Variant
from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.inputs import inputs_of


def row(variant: str, p50: float, cov: float | None = 0.01, **more: Any) -> dict[str, Any]:
    figures = {f"p{q}_ms": p50 * (1 + q / 1000) for q in (90, 95, 99)}
    return {
        "variant": variant, "case": "forward", "batch": 1, "p50_ms": p50, **figures, "min_ms": p50, "cov": cov,
        "images_per_second": 1e3 / p50, "first_call_ms": p50, "load_s": 0.1, "host_mib": 12.0, "device_mib": None,
        "file_mib": 3.0, "calls": 10, "warnings": [], **more,
    }  # fmt: skip


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "model": {"family": "hflow", "resolution": 16, "precision": "fp32", "checkpoint": "ab", "verified": True},
        "machine": {"cpu": "one", "cores": 2},
        "settings": {"rounds": 3},
        "warnings": [],
        "floors": [],
        "rows": list(rows),
    }


def test_percentiles_are_of_all_calls_and_the_spread_of_rounds() -> None:
    rounds = [[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]
    found = statistics_of(rounds, batch=4)
    everything = np.concatenate([np.array(seconds) for seconds in rounds])
    assert found["p50_ms"] == 2000
    assert found["p95_ms"] == pytest.approx(1e3 * np.percentile(everything, 95))
    assert found["cov"] == pytest.approx(np.std([1, 2, 3], ddof=1) / 2)  # of the medians: the 9 is no other round
    assert found["images_per_second"] == 2
    assert found["calls"] == 9
    assert statistics_of([[1.0]], batch=1)["cov"] is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, []),
        ({"cov": 0.03}, ["unstable"]),
        ({"cov": None}, ["unstable"]),
        ({"queue_s": 0.009, "copy_s": 0.001}, ["launch-bound"]),
        ({"queue_s": 0.001, "copy_s": 0.004}, ["transfer-bound"]),
    ],
)
def test_a_row_warns_of_itself(found: dict[str, Any], expected: list[str]) -> None:
    assert warnings_of(row("onnx", 10.0) | found) == expected


def test_ratios_are_against_the_baseline_or_the_first_row() -> None:
    assert ratios([row("onnx", 2.0), row(BASELINE, 8.0)]) == {"onnx": 4.0, BASELINE: 1.0}
    assert ratios([row("onnx", 2.0), row("trt", 1.0)]) == {"onnx": 1.0, "trt": 2.0}


def test_markdown_shows_figures_warnings_and_reasons() -> None:
    gone = {"variant": "trt", "device": "cuda", "reason": "no GPU | none"}
    failed = {"variant": "torch.compile", "case": "forward", "batch": 1, "reason": "no compiler"}
    shown = row("onnx", 2.0, 0.031, warnings=["unstable"], error=1.5e-6)
    text = markdown(report(row(BASELINE, 8.0), shown, failed, gone) | {"warnings": ["other work"]})
    assert "| onnx | 2.00 | 4.00x |" in text
    assert "| 3.1% |" in text
    assert "1.5e-06 | unstable |" in text
    assert "| trt | no GPU / none |" in text
    assert "no compiler |" in text
    assert "**Warning: other work**" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith(("| onnx", "| torch"))}) == 1


def test_comparing_tells_changes_from_noise() -> None:
    before = report(row("onnx", 10.0), row("trt", 10.0, 0.2), row("gone", 1.0))
    found = compare(before, report(row("onnx", 5.0), row("trt", 9.0), row("new", 1.0)))
    assert [(r["variant"], r["times_as_fast"], r["changed"]) for r in found] == [
        ("onnx", 2.0, True),
        ("trt", pytest.approx(10 / 9), False),
    ]


def test_reports_are_read_back_and_others_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(report(row("onnx", 1.0))))
    assert read_report(path)["rows"][0]["variant"] == "onnx"
    for text in ("{", "[1]", '{"format": 2, "rows": []}'):
        path.write_text(text)
        with pytest.raises(DataError, match="no latency report"):
            read_report(path)
    with pytest.raises(DataError, match="cannot read"):
        read_report(tmp_path / "none.json")


def test_the_chart_is_a_picture_of_every_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    sizes = []
    for rows in ([row("onnx", 1.0)], [row("onnx", 1.0), row("onnx", 9.0) | {"batch": 4}]):
        chart(report(*rows), tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            sizes.append(image.height)
    assert sizes[1] > 1.5 * sizes[0]


def test_inputs_differ_between_rounds_and_not_between_processes(tiny_run: Path) -> None:
    bundle = find_bundle(tiny_run)
    for graph in ("forward", "inverse"):
        one, same, other = (inputs_of(bundle, graph, 3, seed) for seed in (1, 1, 2))
        for name, array in one.items():
            assert np.array_equal(array, same[name])
            assert not np.array_equal(array, other[name])
            assert array.dtype == np.float32
    pictures = inputs_of(bundle, "inverse", 3, 1)["image"]
    assert pictures.shape == (3, 3, 16, 16)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert np.array_equal(pictures * 255, np.rint(pictures * 255))


def test_every_variant_leaves_figures_or_a_reason(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them dies in its first round, and the others go on."""

    class Dying(measuring.Worker):
        def ask(self, do: str, **values: Any) -> dict[str, Any]:
            if self.name == dying and values.get("seed", 0) == 1:
                self._process.kill()
            return super().ask(do, **values)

    monkeypatch.setattr(measuring, "Worker", Dying)
    dying = "torch eager, folded"
    names = [BASELINE, dying, "onnx", "trt"]
    found = measure_latency(find_bundle(tiny_run), names, ["forward", "inverse"], [2], rounds=2)
    rows = [r for r in found["rows"] if r["variant"] != dying]
    assert [r["reason"] for r in found["rows"] if "killed" in r.get("reason", "")] == [
        r["reason"] for r in found["rows"] if r["variant"] == dying
    ]
    assert len(found["rows"]) - len(rows) == 1  # of what comes after there is nothing
    assert [(r["variant"], r["case"], r["batch"]) for r in rows if "case" in r] == [
        (name, case, 2) for case in ("forward", "inverse") for name in (BASELINE, "onnx")
    ]
    for r in rows:
        if r["variant"] == "trt":
            assert "GPU" in r["reason"]
            continue
        assert 0 < r["min_ms"] <= r["p50_ms"] <= r["p90_ms"] <= r["p99_ms"]
        assert 0 < r["of_roof"] < 2  # a busy machine gives the roof less than a variant
        assert r["error"] < 1e-3  # a float32 backend against float64; exact only by accident
        assert r["host_mib"] > 10
        assert r["file_mib"] > 0
        assert r["load_s"] > 0
        assert r["backend"].startswith("torch" if "torch" in r["variant"] else "onnxruntime CPU")
    assert any(r.get("error", 0) > 0 for r in rows)
    assert found["machine"]["cores"] >= 1
    assert [(f["case"], f["batch"]) for f in found["floors"]] == [("forward", 2), ("inverse", 2)]
    assert all(f["floor_ms"] > 0 for f in found["floors"])
    work = sum(count(find_bundle(tiny_run), "forward").values(), Work())
    assert found["floors"][0]["gflop"] == pytest.approx(2 * work.operations / 1e9)
    assert markdown(found).count("| onnx |") == 2
    assert markdown(found).count("Floor on cpu: ") == 2


def test_where_nothing_runs_every_reason_is_named(tiny_run: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"trt: .*GPU"):
        measure_latency(find_bundle(tiny_run), ["trt"], ["forward"], [1], rounds=1)


def test_operations_are_those_that_torch_counts(tiny_run: Path, tiny_model: Any) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    bundle = find_bundle(tiny_run)
    latents = {name: torch.from_numpy(a) for name, a in inputs_of(bundle, "forward", 1, 0).items()}
    folded = tiny_model.folded()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        folded.decode(latents)
    parts = count(bundle, "forward")
    assert {"levels.0", "levels.1", "end_flow"} <= parts.keys()
    # the graph blurs by convolutions, where torch adds shifted copies
    assert sum(work.operations for work in parts.values()) == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert sum(work.weight_bytes for work in parts.values()) < bundle.model.stat().st_size


def test_the_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    work = Work(operations=4e9, weight_bytes=1e6, activation_bytes=1e6)
    assert floor_seconds(work, 2, 1e9, 1e9) == 8.0
    assert floor_seconds(work, 2, 1e15, 1e3) == 3e3


def test_every_variant_is_described() -> None:
    assert BASELINE in VARIANTS
    for name, variant in VARIANTS.items():
        assert isinstance(variant, Variant)
        assert ("CUDA" in name or "trt" in name or "TensorRT" in name) == (variant.device == "cuda"), name
