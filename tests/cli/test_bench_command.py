"""`hflow-rt bench`."""

import json
from pathlib import Path
from typing import Any

import pytest


def test_measures_writes_and_compares(run: Path, hflow: Any) -> None:
    pytest.importorskip("matplotlib")
    done = hflow("bench", run, "--variant", "onnx", "--route", "forward", "--batch", "2", "--rounds", "2")
    assert done.code == 0, done.err
    bundle = run / "bundle"
    report = json.loads((bundle / "latency.json").read_text())
    assert [(row["variant"], row.get("batch")) for row in report["rows"]] == [("onnx", 2)]
    assert (bundle / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert "forward, batch 2" in (bundle / "latency.md").read_text()
    assert (bundle / "latency.md").read_text() in done.out
    assert hflow("info", run).code == 0  # a report is no foreign file to the bundle
    both = hflow("bench", "--compare", bundle / "latency.json", bundle / "latency.json")
    assert both.code == 0
    assert "1.00x  (within the spread)" in both.out


def test_json_goes_to_stdout_alone(run: Path, hflow: Any, tmp_path: Path) -> None:
    arguments = ("--variant", "onnx", "--route", "inverse", "--rounds", "1", "-o", tmp_path / "there", "--json")
    done = hflow("bench", run, *arguments)
    report = json.loads(done.out)
    assert report["rows"][0]["case"] == "inverse"
    assert str(tmp_path / "there.json") in report["output"]
    assert not (run / "bundle" / "latency.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--variant", "tpu"), "no variant has 'tpu' in its name; known: torch eager"),
        (("--batch", "0"), "must be at least 1"),
        (("--compare", "no.json", "no.json"), "cannot read no.json"),
        (("--variant", "trt"), "nothing here can run"),
    ],
)
def test_mistakes_are_one_line(run: Path, hflow: Any, arguments: tuple[str, ...], said: str) -> None:
    done = hflow("bench", *(() if "--compare" in arguments else (run,)), *arguments)
    assert done.code == 1
    assert done.out == ""
    assert said in done.err.splitlines()[-1]
