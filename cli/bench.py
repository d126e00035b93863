"""`hflow-rt bench`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.choices import Routes
from hflow_rt.cli.app import app
from hflow_rt.cli.opening import locate_bundle
from hflow_rt.cli.options import JsonOption, ModelArgument
from hflow_rt.cli.terminal import note, print_json, say, say_next, status
from hflow_rt.names import quoted


@app.command()
def bench(
    model: ModelArgument = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Images of a call; repeatable.")] = None,
    route: Annotated[
        Routes, typer.Option("--route", "--direction", help="forward, inverse or both, which is every graph.")
    ] = "both",
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
    from hflow_rt.bench import asked
    from hflow_rt.bench.report import markdown

    if compare is not None:
        rows, lines = asked.side_by_side(*compare)
        if json:
            print_json({"rows": rows})
            return
        for line in lines:
            say(line)
        return
    bundle = locate_bundle(model, json)
    with status(json) as progress:
        report, written = asked.bench(bundle, route, variants or (), batches or (1,), rounds, output, progress, note)
    if json:
        print_json(report | {"output": written})
        return
    for line in markdown(report).splitlines():
        say(line)
    say(f"written: {', '.join(written)}")
    say_next(f"hflow-rt bench --compare {quoted(written[0])} LATER.json")
