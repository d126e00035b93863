"""Measure how ONNX Runtime runs a bundle fastest on the CPU of this machine, and remember it."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hflow_rt.errors import DataError
from hflow_rt.extras import needed
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.engines.cpu import OPTIMISED, Settings, cores, default, tuned_graph
from hflow_rt.runtime.engines.onnx import OnnxEngine
from hflow_rt.runtime.inputs import inputs_of

__all__ = ["Trial", "forget", "tunable", "tune_runtime"]

_FILL = 0.1  # seconds of a round at least
_MARGIN = 1.03  # times as fast as the default, or it stays


@dataclass(frozen=True)
class Trial:
    """One way to run a graph: `ms` is the median of the rounds, `kept` whether it was chosen."""

    graph: str
    batch: int
    what: str
    ms: float
    kept: bool = False


def tunable(bundle: Bundle) -> list[str]:
    """The graphs that are a whole route; what of a loop is fastest depends on the calls around it."""
    manifest = bundle.manifest
    return [graph for graph in manifest.routes.values() if isinstance(graph, str) and graph in manifest.graphs]


def tune_runtime(
    bundle: Bundle,
    graphs: Sequence[str],
    batch: int,
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Of each graph: `trials`, the `settings` that were kept, `load_s` before and after.

    What concerns one call is measured on one image, sharing out on `batch`. Raises `BackendUnavailable` without ONNX
    Runtime, `DataError` where nothing can be kept.
    """
    runtime = _runtime()
    for graph in graphs:  # before anything is measured
        tuned_graph(bundle, graph, runtime.__version__).prepare()
    found: dict[str, dict[str, Any]] = {}
    for graph in graphs:
        usual = default()
        ways = {
            "as usual": usual,
            "threads sleep when they wait": replace(usual, spinning=False),
            "memory is given back": replace(usual, arena=False),
            "channels are not in blocks": replace(usual, blocked=False),
        }
        if cores() > 1:
            ways["one thread"] = replace(usual, threads=1)
        progress(f"{graph}: one image")
        trials, best = _race(bundle, graph, 1, ways, rounds)
        if cores() > 1 and batch > 1:
            progress(f"{graph}: {batch} images")
            pieces: dict[int, int] = {}
            for piece in (usual.piece, 1, 4, 0):
                pieces.setdefault(Settings(piece=piece).parts(batch), piece)
            shared = {_of(piece): replace(best, piece=piece) for piece in pieces.values()}
            more, best = _race(bundle, graph, batch, shared, rounds)
            trials += more
        progress(f"{graph}: keeping the optimised graph")
        place = tuned_graph(bundle, graph, runtime.__version__)
        before = _seconds(lambda: OnnxEngine(bundle, "cpu", runtime, settings=best).session(graph))  # noqa: B023
        place.write(best, lambda path: _optimise(bundle, graph, best, runtime, path))  # noqa: B023
        after = _seconds(lambda: OnnxEngine(bundle, "cpu", runtime).session(graph))  # noqa: B023
        found[graph] = {
            "trials": [asdict(trial) for trial in trials],
            "settings": asdict(best),
            "load_s": {"before": before, "after": after},
            "path": str(place.path),
        }
    return found


def forget(bundle: Bundle, graphs: Sequence[str]) -> list[str]:
    """Remove what was kept of `graphs`; of which there was something."""
    return [graph for graph in graphs if tuned_graph(bundle, graph, _runtime().__version__).forget()]


def _runtime() -> Any:
    with needed("onnxruntime", "tuning needs ONNX Runtime: pip install 'hflow-rt[cpu]'"):
        import onnxruntime
    return onnxruntime


def _of(piece: int) -> str:
    return f"{piece} image{'s' if piece > 1 else ''} a thread at a time" if piece else "together"


def _race(
    bundle: Bundle, graph: str, batch: int, ways: dict[str, Settings], rounds: int
) -> tuple[list[Trial], Settings]:
    """Every way in every round, in an order that rotates; the first is left only for one that is clearly faster."""
    runtime = _runtime()
    engines = {what: OnnxEngine(bundle, "cpu", runtime, settings=settings) for what, settings in ways.items()}
    times: dict[str, list[float]] = {what: [] for what in ways}
    names = list(ways)
    try:
        for turn in range(rounds + 1):
            inputs = list(inputs_of(bundle, graph, batch, turn).values())
            for what in names[turn % len(names) :] + names[: turn % len(names)]:
                calls, started = 0, time.perf_counter()
                while calls == 0 or time.perf_counter() - started < _FILL:
                    engines[what].run(graph, inputs)
                    calls += 1
                times[what].append((time.perf_counter() - started) / calls)
    finally:
        for engine in engines.values():
            engine.close()
    medians = {what: statistics.median(times[what][1:]) for what in names}  # the first round warms up
    fastest = min(names, key=lambda what: medians[what])
    kept = fastest if medians[names[0]] > _MARGIN * medians[fastest] else names[0]
    return [Trial(graph, batch, what, medians[what] * 1e3, what == kept) for what in names], ways[kept]


def _optimise(bundle: Bundle, graph: str, settings: Settings, runtime: Any, path: Path) -> None:
    """Write the graph to `path` as ONNX Runtime optimised it, its constants beside it."""
    options = settings.options(runtime, settings.threads)
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{OPTIMISED}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        runtime.InferenceSession(str(bundle.graph(graph)), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own, none public
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot keep the optimised graph in {path.parent.parent}: {reason}; free space") from error


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
