"""How ONNX Runtime uses the processors of this machine, and where what `hflow-rt tune` found out about that is kept.

One image is computed by all threads together. A batch of at least as many images as there are threads is shared out
among calls of one thread and few images each, which wait for nobody and find in the cache what they computed last.
"""

import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hflow_rt.errors import BundleError
from hflow_rt.files import atomic_directory, atomic_file
from hflow_rt.manifest import graph_sha256
from hflow_rt.runtime.bundle import Bundle

__all__ = [
    "OPTIMISED",
    "Settings",
    "TunedGraph",
    "cores",
    "default",
    "piece_of",
    "pieces_of",
    "shared_out",
    "threads",
    "tuned_graph",
]

_SETTINGS, OPTIMISED = "settings.json", "optimised.onnx"
_FORMAT = 2  # of the settings; others are measured anew
_PIECE = 2  # images: of one a small model makes little of a call, of more a large one outgrows the cache
_KEPT = 16  # graphs, the last that were measured


@dataclass(frozen=True)
class Settings:
    """How a graph is run.

    threads: that compute one call; 0 leaves it to ONNX Runtime. piece: images of a call where a batch is shared out
    among calls of one thread each; 0 where it is not. spinning: whether threads wait for each other awake. arena:
    whether memory is kept from call to call. blocked: whether channels are laid out in blocks as wide as a vector.
    """

    threads: int = 0
    piece: int = 0
    spinning: bool = True
    arena: bool = True
    blocked: bool = True

    def parts(self, images: int) -> int:
        """Among how many calls a batch is shared out; 1 if it is not, as where some threads would have no image."""
        if not self.piece or images < cores():
            return 1
        return max(cores(), -(-images // self.piece))

    def options(self, runtime: Any, threads: int) -> Any:
        """Session options of ONNX Runtime, for calls of so many threads."""
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # ours is the one line that explains a failure
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = self.arena
        if not self.spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not self.blocked:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        return options


def default() -> Settings:
    """What holds where nothing was measured."""
    return Settings(threads(), piece=_PIECE if cores() > 1 else 0)


def threads() -> int:
    """How many threads compute one call; 0 leaves it to ONNX Runtime, which counts the machine's cores.

    It heeds neither OMP_NUM_THREADS, as torch does, nor that this process may be held to fewer cores, and then its
    threads fight over them.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return allowed if allowed < (os.cpu_count() or 1) else 0


def cores() -> int:
    """How many threads can compute together here."""
    return threads() or os.cpu_count() or 1


def pieces_of(images: int, parts: int) -> list[slice]:
    """A batch as `parts` runs of images, of even length as far as that goes."""
    bounds = np.linspace(0, images, parts + 1).round().astype(int)
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def piece_of(array: Any, piece: slice) -> Any:
    """Some images of a batch; a row that all images share stays as it is."""
    return array if len(array) == 1 else array[piece]


def shared_out(
    run: Callable[[Sequence[Any]], list[Any]], inputs: Sequence[Any], parts: int, pool: Executor
) -> list[Any]:
    """`run` on `parts` runs of images together; outputs as from one call."""
    pieces = pieces_of(max(len(array) for array in inputs), parts)
    results = list(pool.map(lambda piece: run([piece_of(array, piece) for array in inputs]), pieces))
    return [np.concatenate(outputs) for outputs in zip(*results, strict=True)]


class TunedGraph:
    """Where the settings of one graph on this machine are kept, with the graph as ONNX Runtime optimised it.

    graph: its digest, constants included. Another processor, another ONNX Runtime or other threads have tuned graphs
    of their own.
    """

    def __init__(self, graph: str, version: str) -> None:
        what = json.dumps([_FORMAT, graph, version, threads(), cores(), _processor()])
        self.path = _cache() / hashlib.sha256(what.encode()).hexdigest()[:24]

    def read(self) -> Settings | None:
        """What was measured; None where nothing was. Raises `BundleError` for what nobody can read."""
        try:
            found = Settings(**json.loads((self.path / _SETTINGS).read_text()))
        except OSError:
            return None
        except (ValueError, TypeError) as error:
            raise BundleError(f"{self.path} is damaged; measure again with 'hflow-rt tune'") from error
        if any(
            type(value) is not type(usual) for value, usual in zip(astuple(found), astuple(Settings()), strict=True)
        ):
            raise BundleError(f"{self.path} is damaged; measure again with 'hflow-rt tune'")
        return found

    def prepare(self) -> None:
        """Raise `DataError` where nothing can be kept."""
        with atomic_file(self.path.parent / ".writable") as temporary:
            temporary.write_text("")
        (self.path.parent / ".writable").unlink(missing_ok=True)

    @property
    def optimised(self) -> Path | None:
        """The graph as ONNX Runtime optimised it; it opens several times as fast."""
        return self.path / OPTIMISED if (self.path / OPTIMISED).is_file() else None

    def write(self, settings: Settings, optimise: Callable[[Path], None]) -> None:
        """Keep `settings`, and what `optimise` writes to the path it is given; what was kept longest goes.

        Raises `DataError` where the disk is full or nobody may write.
        """
        with atomic_directory(self.path) as folder:
            optimise(folder / OPTIMISED)
            (folder / _SETTINGS).write_text(json.dumps(asdict(settings), indent=1) + "\n")
        others = sorted(self.path.parent.glob("[!.]*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)

    def forget(self) -> bool:
        """Remove what is kept; whether there was anything."""
        there = self.path.exists()
        shutil.rmtree(self.path, ignore_errors=True)
        return there


def tuned_graph(bundle: Bundle, graph: str, version: str) -> TunedGraph:
    """Where what is known of a graph of `bundle` in ONNX Runtime `version` is kept."""
    return TunedGraph(graph_sha256(bundle.manifest, graph), version)


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("hflow-rt", appauthor=False)) / "tuned"


@functools.cache
def _processor() -> str:
    """What it is and what it can do: machines of one name may have other instructions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    known = [line for line in lines if line.startswith(("model", "cpu family", "flags", "Features"))]
    return "\n".join(dict.fromkeys(known)) or f"{platform.machine()} {platform.processor()}"
