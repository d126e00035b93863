"""One variant in a process of its own: answers requests, one JSON object a line, until its input ends.

python -m hflow_rt.bench.worker BUNDLE VARIANT
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hflow_rt.bench.variants import Running, opened
from hflow_rt.errors import HFlowError
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.inputs import inputs_of

__all__ = ["main"]


def main() -> None:
    """Open the variant, say so, and do what is asked."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between the answers

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    try:
        bundle = find_bundle(Path(sys.argv[1]))
        started = time.perf_counter()
        running = opened(sys.argv[2]).open(bundle)
        answer(backend=running.backend, load_s=time.perf_counter() - started)
        for line in sys.stdin:
            request = json.loads(line)
            answer(**_REQUESTS[request.pop("do")](running, **request))
    except KeyboardInterrupt:  # for the whole group; the process that asked says so
        return
    except Exception as error:  # whatever a backend raises is the reason that its row shows
        text = str(error).strip() or "no message"
        kind = "" if isinstance(error, HFlowError) else f"{type(error).__name__}: "
        answer(reason=(kind + text.splitlines()[0])[:300])


def _first(running: Running, graph: str, batch: int) -> dict[str, Any]:
    """The first call at this batch size, and the peak of memory from here on."""
    placed = running.place(inputs_of(running.bundle, graph, batch, 0))
    _forget_peak()
    started = time.perf_counter()
    running.call(graph, placed)
    return {"seconds": time.perf_counter() - started}


def _time(running: Running, graph: str, batch: int, seed: int, calls: int) -> dict[str, Any]:
    """Seconds of each call."""
    placed = running.place(inputs_of(running.bundle, graph, batch, seed))
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        running.call(graph, placed)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds}


def _overheads(running: Running, graph: str, batch: int) -> dict[str, Any]:
    """On a GPU: seconds of queueing a call without waiting, and of copying its inputs there and its outputs back."""
    arrays = inputs_of(running.bundle, graph, batch, 0)
    placed = running.place(arrays)
    outputs = running.call(graph, placed)
    started = time.perf_counter()
    running.launch(graph, placed)
    queued = time.perf_counter() - started
    running.call(graph, placed)
    started = time.perf_counter()
    running.place(arrays)
    running.host(outputs)
    return {"queue_s": queued, "copy_s": time.perf_counter() - started}


def _peak(running: Running) -> dict[str, Any]:
    """MiB of the host since `_first`, and of a CUDA device: of torch's tensors, else of all that is taken there."""
    device = None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        device = (torch.cuda.max_memory_allocated() or total - free) / 2**20
    return {"host_mib": _high_water(), "device_mib": device}


def _outputs(running: Running, graph: str, batch: int, path: str) -> dict[str, Any]:
    """Write the outputs for the inputs of seed 0 to `path`."""
    import numpy as np

    outputs = running.host(running.call(graph, running.place(inputs_of(running.bundle, graph, batch, 0))))
    np.savez(path, *outputs)
    return {}


def _bandwidth(running: Running) -> dict[str, Any]:
    return {"bytes_per_second": running.bandwidth()}  # type: ignore[attr-defined]  # only a roof is asked


_REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "first": _first,
    "time": _time,
    "overheads": _overheads,
    "peak": _peak,
    "outputs": _outputs,
    "bandwidth": _bandwidth,
}


def _forget_peak() -> None:
    """Let the kernel start a new high-water mark, where there is one to start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the mark then is that of the whole process


def _high_water() -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


if __name__ == "__main__":
    main()
