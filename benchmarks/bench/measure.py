"""Rounds that take turns: every variant answers in every round, in an order that rotates."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from hflow_rt.bench.floor import floor_seconds, work_of
from hflow_rt.bench.machine import busy, machine
from hflow_rt.bench.variants import REFERENCE, ROOF_OPERATIONS, ROOFS, VARIANTS, files_of, opened
from hflow_rt.errors import BackendUnavailable, HFlowError
from hflow_rt.runtime.bundle import Bundle

__all__ = ["UNSTABLE", "measure_latency", "statistics_of", "warnings_of"]

UNSTABLE = 0.025  # a larger spread of the rounds is pointed out
_FILL = 0.1  # seconds of a round at least
_WARM = 8.0  # seconds of warm-up at most
Row = dict[str, Any]


class Gone(HFlowError):  # noqa: N818 - the reason for a row without figures
    """Why a variant gives no figures."""


class Worker:
    """A variant in its process."""

    def __init__(self, name: str, bundle: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hflow_rt.bench.worker", str(bundle), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **opened(name).environment},
        )
        try:
            self.about = self._answer()
        except Gone:
            self.close()
            raise

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Raises `Gone`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Gone("its process ended") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise Gone("it ran out of memory or was killed" if code == -9 else f"its process ended with status {code}")
        answer: dict[str, Any] = json.loads(line)
        if "reason" in answer:
            raise Gone(answer["reason"])
        return answer

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def measure_latency(
    bundle: Bundle,
    variants: Sequence[str],
    cases: Sequence[str],
    batches: Sequence[int],
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """The report: what it was measured on, and a row for every variant, case and batch size.

    cases: graphs, and routes that are loops, see `cases_of`.
    A row has figures (see `statistics_of`) or the reason why there are none. keep: called with the report so far
    after every case. Raises `BackendUnavailable` if no variant runs.
    """
    warning = busy()
    manifest = bundle.manifest
    rows: list[Row] = []
    floors: list[Row] = []
    report = {
        "format": 1,
        "model": {
            "family": manifest.family,
            "resolution": manifest.resolution,
            "precision": manifest.precision,
            "tuning": manifest.tuning,
            "checkpoint": manifest.checkpoint.get("sha256"),
            "verified": manifest.verified,
        },
        "machine": machine(),
        "settings": {"rounds": rounds},
        "warnings": [warning] if warning else [],
        "floors": floors,
        "rows": rows,
    }
    with _workers(bundle, variants, rows, progress) as workers, _roofs(bundle, workers) as roofs:
        if not workers:
            reasons = "; ".join(f"{row['variant']}: {row['reason']}" for row in rows)
            raise BackendUnavailable(f"nothing here can run {bundle.path} ({reasons})")
        for case in cases:
            for batch in batches:
                progress(f"{case}, batch {batch}")
                found, reached = _case(bundle, workers, roofs, case, batch, rounds)
                rows += found
                floors += _floors(bundle, found, reached, case, batch)
                keep(report)
    return report


@contextmanager
def _workers(
    bundle: Bundle, variants: Sequence[str], rows: list[Row], progress: Callable[[str], None]
) -> Iterator[dict[str, Worker]]:
    """Those that open, by name; the others leave a row."""
    workers: dict[str, Worker] = {}
    try:
        for name in variants:
            progress(f"opening {name}")
            try:
                workers[name] = Worker(name, bundle.path)
            except Gone as gone:
                rows.append({"variant": name, "device": VARIANTS[name].device, "reason": str(gone)})
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


@contextmanager
def _roofs(bundle: Bundle, workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    """By device that computes: what shows how much the device can do, where torch is there to show it."""
    roofs: dict[str, Worker] = {}
    try:
        for device in sorted({VARIANTS[name].device for name in workers}):
            with suppress(Gone):
                roofs[device] = Worker(ROOFS[device], bundle.path)
        yield roofs
    finally:
        for roof in roofs.values():
            roof.close()


def _case(
    bundle: Bundle, workers: dict[str, Worker], roofs: dict[str, Worker], case: str, batch: int, rounds: int
) -> tuple[list[Row], Row]:
    """Rows of one case and batch size, and the operations a second that the roof of each device reached.

    A failing variant keeps its reason and is skipped from then on.
    """
    request = {"graph": case, "batch": batch}
    rows: dict[str, Row] = {name: {"variant": name, "case": case, "batch": batch} for name in workers}
    calls: dict[str, int] = {}
    times: dict[str, list[list[float]]] = {name: [] for name in workers}

    def attempt(name: str, work: Callable[[Worker], None]) -> None:
        try:
            work(workers[name])
        except Gone as gone:
            rows[name]["reason"] = str(gone)
            workers.pop(name).close()

    def warm(worker: Worker) -> None:
        first = worker.ask("first", **request)["seconds"]
        rows[worker.name] |= {"first_call_ms": first * 1e3, "load_s": worker.about["load_s"]}
        calls[worker.name] = _until_stable(lambda count: worker.ask("time", **request, seed=0, calls=count)["seconds"])

    def turn(worker: Worker, seed: int) -> None:
        times[worker.name].append(worker.ask("time", **request, seed=seed, calls=calls[worker.name])["seconds"])

    def close(worker: Worker) -> None:
        device = VARIANTS[worker.name].device
        row = rows[worker.name]
        row |= {"backend": worker.about["backend"], "device": device}
        row |= statistics_of(times[worker.name], batch)
        row["file_mib"] = files_of(VARIANTS[worker.name], bundle.path, bundle.manifest, case) / 2**20
        row |= worker.ask("peak")
        if device == "cuda":
            row |= worker.ask("overheads", **request)
        row["warnings"] = warnings_of(row)

    reached: dict[str, list[float]] = {device: [] for device in roofs}
    for name in list(workers):
        attempt(name, warm)
    for index in range(rounds):
        for device, roof in roofs.items():
            reached[device] += roof.ask("time", **request, seed=0, calls=5)["seconds"][1:]
        names = list(workers)
        first = index % max(1, len(names))
        for name in names[first:] + names[:first]:
            attempt(name, lambda worker: turn(worker, index + 1))  # noqa: B023 - called at once
    for name in list(workers):
        attempt(name, close)
    with tempfile.TemporaryDirectory() as folder, suppress(Gone):  # without torch there is nothing to hold against
        exact = _exact(bundle, case, Path(folder))
        for name in list(workers):
            attempt(name, lambda worker: rows[worker.name].update(error=_error(worker, case, exact, Path(folder))))
    best = {device: ROOF_OPERATIONS[device] / statistics.median(seconds) for device, seconds in reached.items()}
    for device, roof in roofs.items():
        best[f"{device} bytes"] = roof.ask("bandwidth")["bytes_per_second"]
    return list(rows.values()), best


def _floors(bundle: Bundle, rows: list[Row], reached: Row, case: str, batch: int) -> list[Row]:
    """What the case takes at least on each device; adds to each row what it reached."""
    try:
        work = work_of(bundle, case)
    except BackendUnavailable:
        return []  # without onnx nothing is counted, and the columns stay empty
    for row in rows:
        # in tuned graphs torch has no part
        if "p50_ms" in row and (bundle.manifest.tuning == "any" or VARIANTS[row["variant"]].files == "graphs"):
            row["gflops"] = work.operations * batch / row["p50_ms"] / 1e6
            if row["device"] in reached:
                row["of_roof"] = row["gflops"] * 1e9 / reached[row["device"]]
    return [
        {
            "case": case,
            "batch": batch,
            "device": device,
            "gflop": work.operations * batch / 1e9,
            "roof_gflops": reached[device] / 1e9,
            "megabytes": (work.weight_bytes + batch * work.activation_bytes) / 1e6,
            "roof_gb_per_s": reached[f"{device} bytes"] / 1e9,
            "floor_ms": 1e3 * floor_seconds(work, batch, reached[device], reached[f"{device} bytes"]),
        }
        for device in ROOFS
        if device in reached
    ]


def _until_stable(run: Callable[[int], list[float]]) -> int:
    """Warm up until two medians agree; returns how many calls fill a round."""
    spent, before = 0.0, math.inf
    while True:
        count = 1 if before == math.inf else max(1, math.ceil(_FILL / before))
        seconds = run(count)
        spent += sum(seconds)
        median = statistics.median(seconds)
        if abs(median - before) < UNSTABLE * before or spent > _WARM:
            return max(1, math.ceil(_FILL / median))
        before = median


def _exact(bundle: Bundle, case: str, folder: Path) -> list[Any]:
    """Outputs in float64, of batch 1. Raises `Gone`."""
    reference = Worker(REFERENCE, bundle.path)
    try:
        return _read(reference, case, folder / "exact.npz")
    finally:
        reference.close()


def _error(worker: Worker, case: str, exact: list[Any], folder: Path) -> float:
    """The largest difference of any output from the exact one, over that one's largest value or 1. Raises `Gone`."""
    found = _read(worker, case, folder / "found.npz")
    return float(max(np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in zip(found, exact, strict=True)))


def _read(worker: Worker, case: str, path: Path) -> list[Any]:
    """Outputs of batch 1."""
    worker.ask("outputs", graph=case, batch=1, path=str(path))
    with np.load(path) as outputs:
        return [outputs[f"arr_{index}"] for index in range(len(outputs))]


def statistics_of(rounds: Sequence[Sequence[float]], batch: int) -> Row:
    """Percentiles of all calls, and the coefficient of variation of the rounds' medians.

    rounds: seconds of each call of each round.
    """
    calls = np.concatenate([np.asarray(seconds) for seconds in rounds])
    medians = [statistics.median(seconds) for seconds in rounds]
    spread = statistics.stdev(medians) / statistics.mean(medians) if len(medians) > 1 else None
    percentiles = {f"p{q}_ms": float(np.percentile(calls, q)) * 1e3 for q in (50, 90, 95, 99)}
    return {
        **percentiles,
        "min_ms": float(calls.min()) * 1e3,
        "cov": spread,
        "images_per_second": batch / statistics.median(calls.tolist()),
        "calls": len(calls),
    }


def warnings_of(row: Row) -> list[str]:
    """What a reader should know before trusting a row, or making it faster."""
    found = []
    if row["cov"] is None or row["cov"] > UNSTABLE:
        found.append("unstable")
    if row.get("queue_s", 0.0) * 1e3 > 0.8 * row["p50_ms"]:
        found.append("launch-bound")
    if row.get("copy_s", 0.0) * 1e3 > 0.3 * row["p50_ms"]:
        found.append("transfer-bound")
    return found
