"""Shared by the benchmarks: models to measure, fair timing, and a report of ratios.

    pytest benchmarks                    everything, a table at the end
    pytest benchmarks --report NAME      also benchmarks/results/NAME.json and .md, and NAME-PRESET.json, .md and .png

A ratio compares medians of rounds that take turns, so that a slow spell of the machine hits all variants alike.
Nothing here passes or fails by time.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measuring import RESULTS, exported_like, spread, take_turns

from hflow_rt.bench.machine import machine
from hflow_rt.bench.measure import UNSTABLE
from hflow_rt.bench.report import markdown, write_report

_ROWS: list[dict[str, Any]] = []
_TABLES: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", metavar="NAME", help="write benchmarks/results/NAME.json and .md")
    parser.addoption("--rounds", type=int, default=9, help="of variants that take turns [9]")
    parser.addoption("--bundles", metavar="FOLDER", help="keep exported bundles there, and take those that are there")


def record(title: str, seconds: dict[str, list[float]], **more: Any) -> None:
    """Keep a row a variant for the report; the first variant is the baseline of the ratios."""
    baseline = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        median = statistics.median(values)
        row = {"what": title, "variant": name, "median_ms": median * 1e3, "min_ms": min(values) * 1e3}
        _ROWS.append(row | {"ratio": baseline / median, "cov": spread(values), "rounds": len(values), **more})


@pytest.fixture(name="take_turns")
def take_turns_fixture() -> Callable[..., dict[str, list[float]]]:
    return take_turns


@pytest.fixture(name="record")
def record_fixture() -> Callable[..., None]:
    return record


@pytest.fixture
def against(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`against(TITLE, VARIANTS, AIMS)` times calls in turns and keeps two rows for each baseline in the aims, which say
    by how many times the last variant is to be as fast."""

    def compare(title: str, variants: dict[str, Callable[[], Any]], aims: dict[str, float]) -> None:
        seconds, last = take_turns(variants, request.config.getoption("--rounds"), 0.3), list(variants)[-1]
        for baseline, aim in aims.items():
            record(f"{title}, aim {aim:g}x", {name: seconds[name] for name in (baseline, last)})

    return compare


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Show the latency report of a preset, and keep it where the run has a name."""

    def write(preset: str, report: dict[str, Any]) -> None:
        _TABLES.append(markdown(report))
        name = request.config.getoption("--report")
        if name:
            RESULTS.mkdir(exist_ok=True)
            write_report(report, RESULTS / f"{name}-{preset}")

    return write


@pytest.fixture(scope="session")
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Any, Path]]:
    """`exported(preset, route)` gives the model and its verified bundle, made once a session."""
    made: dict[tuple[str, str], tuple[Any, Path]] = {}
    kept = request.config.getoption("--bundles")

    def make(preset: str, route: str = "both") -> tuple[Any, Path]:
        if (preset, route) not in made:
            folder = Path(kept) / f"{preset}-{route}" if kept else tmp_path_factory.mktemp(preset)
            made[preset, route] = exported_like(preset, folder, route)
        return made[preset, route]

    return make


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| what | variant | median | ratio | CoV | more |", "|---|---|---:|---:|---:|---|"]
    known = {"what", "variant", "median_ms", "min_ms", "ratio", "cov", "rounds"}
    for row in rows:
        more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
        unstable = " (unstable)" if row["cov"] > UNSTABLE else ""
        cells = f"{row['median_ms']:.1f} ms | {row['ratio']:.2f}x | {row['cov']:.1%}{unstable}"
        lines.append(f"| {row['what']} | {row['variant']} | {cells} | {more} |")
    return "\n".join(lines) + "\n"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for text in _TABLES:
        terminalreporter.write_line("\n" + text)
    if not _ROWS:
        return
    about = machine()
    terminalreporter.write_line("\n" + table(_ROWS, about))
    name = config.getoption("--report")
    if name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps({"machine": about, "rows": _ROWS}, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(table(_ROWS, about))
