"""A benchmark as it is asked for: which cases and variants, where its report goes, and two reports side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hflow_rt.assets import is_installed
from hflow_rt.bench.measure import measure_latency
from hflow_rt.bench.report import check_report, compare, read_report, write_report
from hflow_rt.bench.variants import VARIANTS, cases_of
from hflow_rt.choices import Routes
from hflow_rt.errors import BackendUnavailable, ConfigError, DataError
from hflow_rt.limits import check_count
from hflow_rt.runtime.bundle import Bundle

__all__ = ["bench", "side_by_side"]


def bench(
    bundle: Bundle,
    route: Routes = "both",
    variants: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    rounds: int = 10,
    output: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], list[str]]:
    """The report of `measure_latency`, and the files it was written to.

    route: `forward`, `inverse`, or `both` for every graph. variants: those with one of these in their name; all
    without any. output: NAME of NAME.json, .md and .png; by default latency, in the bundle, or here for a bundled
    model. note: hears why there is no chart. Raises `ConfigError`, `DataError`.
    """
    for value in batches:
        check_count("--batch", value)
    check_count("--rounds", rounds)
    cases = cases_of(bundle.manifest, route)
    if not cases:
        raise ConfigError(f"{bundle.path} has no {route} graph; export it with 'hflow-rt export'")
    names = _chosen(variants)
    target = output or (Path() if is_installed(bundle.path) else bundle.path) / "latency"
    check_report(target)
    report = measure_latency(bundle, names, cases, batches, rounds, progress)
    written = [f"{target}.{kind}" for kind in ("json", "md", "png")]
    try:
        write_report(report, target)
    except BackendUnavailable as error:
        note(str(error))
        written.pop()
    return report, written


def side_by_side(before: Path, after: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What two reports both measured, and lines that say so, after how their machines differ. Raises `DataError`."""
    reports = [read_report(path) for path in (before, after)]
    rows = compare(*reports)
    if not rows:
        raise DataError(f"{before} and {after} have no variant, case and batch size in common")
    lines = []
    for key in sorted({key for report in reports for key in report["machine"]}):
        first, second = (report["machine"].get(key) for report in reports)
        if first != second:
            lines.append(f"{key} differs: {first} and {second}")
    for row in rows:
        verdict = "" if row["changed"] else "  (within the spread)"
        lines.append(
            f"{row['case']}, batch {row['batch']:>3}  {row['variant']:<38} "
            f"{row['before_ms']:9.3f} -> {row['after_ms']:9.3f} ms  {row['times_as_fast']:.2f}x{verdict}"
        )
    return rows, lines


def _chosen(wanted: Sequence[str]) -> list[str]:
    names = list(VARIANTS)
    for wish in wanted:
        if not any(wish in name for name in names):
            raise ConfigError(f"no variant has '{wish}' in its name; known: {'; '.join(names)}")
    # a whole name means that one alone, though others may contain it
    hit = [name for name in names if any(wish == name or (wish not in names and wish in name) for wish in wanted)]
    return hit if wanted else names
