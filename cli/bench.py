"""`hflow-rt bench`."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.opening import locate_bundle
from hflow_rt.cli.options import JsonOption, ModelArgument
from hflow_rt.cli.terminal import note, print_json, say, say_next, status
from hflow_rt.limits import check_count
from hflow_rt.names import quoted


@app.command()
def bench(
    model: ModelArgument = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Images of a call; repeatable.")] = None,
    direction: Annotated[str, typer.Option(help="forward, inverse or both, which is every graph.")] = "both",
    variants: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="NAME", help="Only those with NAME in their name; repeatable."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often every variant takes its turn.")] = 10,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="NAME of NAME.json, .md and .png; by default latency, in the bundle (for the bundled model here).",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Measure nothing; set two reports side by side."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure latency and error of the model on every backend, in rounds that take turns.

    Example: hflow-rt bench --batch 1 --batch 16
    """
    from hflow_rt.bench.measure import measure_latency
    from hflow_rt.bench.report import check_report, markdown, write_report
    from hflow_rt.bench.variants import cases_of
    from hflow_rt.errors import BackendUnavailable, ConfigError
    from hflow_rt.manifest import Routes

    if compare is not None:
        _show_comparison(*compare, json)
        return
    for value in batches or ():
        check_count("--batch", value)
    check_count("--rounds", rounds)
    if direction not in get_args(Routes):
        raise ConfigError(f"unknown direction '{direction}'; known: {', '.join(get_args(Routes))}")
    bundle = locate_bundle(model, json)
    cases = cases_of(bundle.manifest, direction)
    if not cases:
        raise ConfigError(f"{bundle.path} has no {direction} graph; export it with 'hflow-rt export'")
    names = _chosen(variants)
    target = output if output is not None else _place(bundle.path)
    check_report(target)
    with status(json) as progress:
        report = measure_latency(bundle, names, cases, batches or [1], rounds, progress)
    written = [f"{target}.{kind}" for kind in ("json", "md", "png")]
    try:
        write_report(report, target)
    except BackendUnavailable as error:
        note(str(error))
        written.pop()
    if json:
        print_json(report | {"output": written})
        return
    for line in markdown(report).splitlines():
        say(line)
    say(f"written: {', '.join(written)}")
    say_next(f"hflow-rt bench --compare {quoted(written[0])} LATER.json")


def _chosen(wanted: list[str] | None) -> list[str]:
    """Names of variants; without a wish all."""
    from hflow_rt.bench.variants import VARIANTS
    from hflow_rt.errors import ConfigError

    names = list(VARIANTS)
    if not wanted:
        return names
    for wish in wanted:
        if not any(wish in name for name in names):
            raise ConfigError(f"no variant has '{wish}' in its name; known: {'; '.join(names)}")
    # a whole name means that one alone, though others may contain it
    return [name for name in names if any(wish == name or (wish not in names and wish in name) for wish in wanted)]


def _place(bundle: Path) -> Path:
    from hflow_rt.assets import pretrained

    return Path("latency") if bundle == pretrained() else bundle / "latency"


def _show_comparison(before: Path, after: Path, json: bool) -> None:
    from hflow_rt.bench.report import compare, read_report
    from hflow_rt.errors import DataError

    reports = [read_report(path) for path in (before, after)]
    rows = compare(*reports)
    if not rows:
        raise DataError(f"{before} and {after} have no variant, direction and batch size in common")
    if json:
        print_json({"rows": rows})
        return
    keys = sorted({key for report in reports for key in report["machine"]})
    for key in keys:
        values: list[Any] = [report["machine"].get(key) for report in reports]
        if values[0] != values[1]:
            say(f"{key} differs: {values[0]} and {values[1]}")
    for row in rows:
        verdict = "" if row["changed"] else "  (within the spread)"
        say(
            f"{row['direction']}, batch {row['batch']:>3}  {row['variant']:<38} "
            f"{row['before_ms']:9.3f} -> {row['after_ms']:9.3f} ms  {row['times_as_fast']:.2f}x{verdict}"
        )
