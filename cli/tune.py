"""`hflow-rt tune`."""

from typing import Annotated, Any

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.opening import locate_bundle, named, warn_if_busy
from hflow_rt.cli.options import JsonOption, ModelArgument
from hflow_rt.cli.terminal import print_json, say, say_next, status
from hflow_rt.limits import check_count


@app.command()
def tune(
    model: ModelArgument = None,
    batch: Annotated[int, typer.Option(help="Images of a call, where they are shared out among threads.")] = 16,
    rounds: Annotated[int, typer.Option(help="How often every way of running takes its turn.")] = 7,
    forget: Annotated[bool, typer.Option("--forget", help="Measure nothing; remove what was kept.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure how ONNX Runtime runs the model fastest on this CPU; all commands then do so, and start sooner.

    What was found is kept in your cache folder, with a copy of the graphs as ONNX Runtime optimised them.

    Example: hflow-rt tune runs/my-run
    """
    from hflow_rt.runtime.engines.tune import forget as forget_all
    from hflow_rt.runtime.engines.tune import tunable, tune_runtime

    check_count("--batch", batch)
    check_count("--rounds", rounds)
    bundle = locate_bundle(model, json)
    graphs = tunable(bundle)
    if forget:
        gone = forget_all(bundle, graphs)
        if json:
            print_json({"forgotten": gone})
        else:
            say(f"forgotten: {', '.join(gone)}" if gone else f"nothing was kept of {bundle.path} on this machine")
        return
    warn_if_busy(json)
    with status(json) as progress:
        found = tune_runtime(bundle, graphs, batch, rounds, progress)
    if json:
        print_json(found)
        return
    for graph, about in found.items():
        _show(graph, about)
    say_next(f"hflow-rt sample{named(model)}", f"hflow-rt bench{named(model)} --variant onnx")


def _show(graph: str, about: dict[str, Any]) -> None:
    usual: dict[int, float] = {}
    for trial in about["trials"]:
        first = usual.setdefault(trial["batch"], trial["ms"])
        mark = "  <- kept" if trial["kept"] else ""
        number = f"{trial['batch']} image{'s' if trial['batch'] > 1 else ''}"
        say(f"{graph}, {number:<10} {trial['what']:<30} {trial['ms']:9.2f} ms  {first / trial['ms']:.2f}x{mark}")
    load = about["load_s"]
    say(f"{graph} opens in {load['after']:.2f} s instead of {load['before']:.2f} s; kept in {about['path']}")
