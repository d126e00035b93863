"""A report as people read it: a table, a chart, and what changed between two of them."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hflow_rt.bench.variants import BASELINE
from hflow_rt.errors import DataError
from hflow_rt.extras import needed
from hflow_rt.files import atomic_file, destination, is_file, is_ours
from hflow_rt.manifest import MANIFEST, MODEL
from hflow_rt.runs import RUN

__all__ = ["chart", "compare", "markdown", "ratios", "read_report", "write_report"]

_TITLE = "# Latency of "  # how a report in Markdown begins

Row = dict[str, Any]
_HEADINGS = (
    "variant", "p50 ms", "ratio", "p90", "p95", "p99", "CoV", "images/s", "GFLOP/s", "of roof", "first call ms",
    "load s", "peak host MiB", "peak device MiB", "files MiB", "error", "",
)  # fmt: skip


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """How many times as fast as the baseline each variant of one case is; the first row stands in for a baseline."""
    figures = {row["variant"]: row["p50_ms"] for row in rows if "p50_ms" in row}
    base = figures.get(BASELINE, next(iter(figures.values()), 0.0))
    return {variant: base / value for variant, value in figures.items()}


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: a table for every case and batch size, then what could not run."""
    model = report["model"]
    lines = [
        f"{_TITLE}{model['family']} {model['resolution']}x{model['resolution']}, {model['precision']}"
        + (f", graphs for a {model['tuning'].upper()}" if model.get("tuning", "any") != "any" else ""),
        "",
        ", ".join(f"{name} {value}" for name, value in report["machine"].items() if value is not None),
        f"rounds {report['settings']['rounds']}; ratio: times as fast as {BASELINE} (or the first row); "
        "error: largest difference of any output from float64, over the output's largest value or 1",
        *(f"**Warning: {warning}**" for warning in report["warnings"]),
    ]
    for (case, batch), rows in cases(report).items():
        speed = ratios(rows)
        lines += ["", f"## {case}, batch {batch}", ""]
        lines += [_floor(found) for found in report["floors"] if (found["case"], found["batch"]) == (case, batch)]
        lines += ["", _table_row(_HEADINGS)] if lines[-1] else [_table_row(_HEADINGS)]
        lines += ["|---|" + "---:|" * (len(_HEADINGS) - 2) + "---|"]
        lines += [_line(row, speed) for row in rows]
    missing = [row for row in report["rows"] if "case" not in row]
    if missing:
        lines += ["", "## Not run", "", "| variant | reason |", "|---|---|"]
        lines += [_table_row((row["variant"], row["reason"].replace("|", "/"))) for row in missing]
    return "\n".join(lines) + "\n"


def cases(report: dict[str, Any]) -> dict[tuple[str, int], list[Row]]:
    """Rows by case and batch size, in the order of the report."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in report["rows"]:
        if "case" in row:
            found.setdefault((row["case"], row["batch"]), []).append(row)
    return found


def _line(row: Row, speed: dict[str, float]) -> str:
    if "p50_ms" not in row:
        return _table_row((row["variant"], *[""] * (len(_HEADINGS) - 2), row["reason"].replace("|", "/")))
    cells = (
        row["variant"],
        _digits(row["p50_ms"]),
        f"{speed[row['variant']]:.2f}x",
        *(_digits(row[f"p{q}_ms"]) for q in (90, 95, 99)),
        "" if row["cov"] is None else f"{row['cov']:.1%}",
        _digits(row["images_per_second"]),
        _digits(row.get("gflops")),
        f"{row['of_roof']:.0%}" if "of_roof" in row else "",
        _digits(row["first_call_ms"]),
        _digits(row["load_s"]),
        *(_digits(row.get(name)) for name in ("host_mib", "device_mib", "file_mib")),
        f"{row['error']:.1e}" if "error" in row else "",
        ", ".join(row["warnings"]),
    )
    return _table_row(cells)


def _floor(found: Row) -> str:
    work = f"{_digits(found['gflop'])} GFLOP at the {_digits(found['roof_gflops'])} GFLOP/s of one large convolution"
    traffic = f"{_digits(found['megabytes'])} MB at the {_digits(found['roof_gb_per_s'])} GB/s of a copy"
    return (
        f"Floor on {found['device']}: {_digits(found['floor_ms'])} ms, the larger of {work} (the roof) and {traffic}."
    )


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _digits(value: float | None) -> str:
    """Three digits that mean something."""
    if value is None:
        return ""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """What two reports both measured: p50 of each, the ratio, and whether it is more than their spreads explain."""
    earlier = {(row["variant"], *case): row for case, rows in cases(before).items() for row in rows if "p50_ms" in row}
    found = []
    for case, rows in cases(after).items():
        for row in rows:
            old = earlier.get((row["variant"], *case))
            if old is None or "p50_ms" not in row:
                continue
            ratio = old["p50_ms"] / row["p50_ms"]
            spread = 2 * ((old["cov"] or 0.0) ** 2 + (row["cov"] or 0.0) ** 2) ** 0.5
            found.append(
                {
                    "variant": row["variant"],
                    "case": case[0],
                    "batch": case[1],
                    "before_ms": old["p50_ms"],
                    "after_ms": row["p50_ms"],
                    "times_as_fast": ratio,
                    "changed": abs(ratio - 1) > max(spread, 0.01),
                }
            )
    return found


def check_report(target: Path) -> None:
    """Raise `DataError` where `write_report` would replace a file that hflow-rt did not write."""
    for kind in ("json", "md", "png"):
        path = destination(f"{target}.{kind}")
        if path.name in (MANIFEST, MODEL, RUN):
            raise DataError(f"{path} is a part of a model; choose another name than {target}")
        if is_file(path) and not _is_report(path):
            raise DataError(f"{path} is there and no report of hflow-rt; choose another name than {target}")


def _is_report(path: Path) -> bool:
    if path.suffix == ".json":
        with contextlib.suppress(DataError):
            return bool(read_report(path))
        return False
    return is_ours(path) if path.suffix == ".png" else path.read_bytes().startswith(_TITLE.encode())


def write_report(report: dict[str, Any], target: Path) -> list[Path]:
    """Write `target`.json, .md and .png; returns what was written.

    Raises `DataError` as `check_report` does, and `BackendUnavailable` for the chart alone.
    """
    import json

    written = [Path(f"{target}.{kind}") for kind in ("json", "md", "png")]
    check_report(target)
    for path, text in zip(written, (json.dumps(report, indent=1) + "\n", markdown(report)), strict=False):
        with atomic_file(path) as file:
            file.write_text(text)
    chart(report, written[-1])
    return written


def read_report(path: Path) -> dict[str, Any]:
    """A report that `bench` wrote. Raises `DataError`."""
    import json

    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is no latency report; 'hflow-rt bench' writes them") from error
    if not isinstance(report, dict) or report.get("format") != 1 or not isinstance(report.get("rows"), list):
        raise DataError(f"{path} is no latency report of this version; 'hflow-rt bench' writes them")
    for row in report["rows"]:
        if "direction" in row:  # as versions before called it
            row["case"] = row.pop("direction")
    return report


def chart(report: dict[str, Any], path: Path) -> None:
    """Bars of the median, one panel a case and batch size, the spread of calls (p50 to p95) as whiskers.

    Raises `BackendUnavailable` without matplotlib.
    """
    with needed("matplotlib", "the chart needs matplotlib: pip install 'hflow-rt[bench]'"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    panels = {case: [row for row in rows if "p50_ms" in row] for case, rows in cases(report).items()}
    height = sum(0.3 * len(rows) + 0.9 for rows in panels.values())
    figure = Figure(figsize=(9, height + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[len(rows) + 1 for rows in panels.values()])
    for axis, ((case, batch), rows) in zip(axes[:, 0], panels.items(), strict=True):
        speed = ratios(rows)
        medians = [row["p50_ms"] for row in rows]
        late = [max(0.0, row["p95_ms"] - row["p50_ms"]) for row in rows]
        colours = ["#8a8f98" if row["variant"] == BASELINE else "#2f6db5" for row in rows]
        bars = axis.barh([row["variant"] for row in rows], medians, color=colours, xerr=[[0] * len(rows), late])
        labels = [f"{_digits(row['p50_ms'])} ms, {speed[row['variant']]:.2f}x" for row in rows]
        axis.bar_label(bars, labels, padding=6, fontsize=8)
        axis.set_xlim(0, 1.3 * max(row["p95_ms"] for row in rows))
        axis.invert_yaxis()
        axis.set_title(f"{case}, batch {batch}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("ms a call, median; whisker: 95 of 100 calls are faster", fontsize=8)
    model = report["model"]
    figure.suptitle(f"{model['family']} {model['resolution']}x{model['resolution']}", x=0.01, ha="left", fontsize=11)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=110, metadata={"Software": "hflow-rt"})
