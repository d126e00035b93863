"""Graphs for the CPU of this machine: of two ways to the same values the one that ONNX Runtime runs faster here."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import helper

from hflow_rt.export.algebra import branches, concatenation, resampling, sizes, taps
from hflow_rt.export.residual_factors import residual_factors
from hflow_rt.export.rewriting import Pass, Rewrite, View, apply
from hflow_rt.export.winograd import winograd
from hflow_rt.runtime.engines.cpu import Settings

__all__ = ["PASSES", "Stopwatch", "Worth", "choose_rewrites"]

Worth = Callable[[View, Rewrite], bool]
# in this order: what one makes, the next may take further
PASSES: dict[str, Pass] = {
    "sizes": sizes,
    "resampling": resampling,
    "residual_factors": residual_factors,
    "branches": branches,
    "concatenation": concatenation,
    "rows": partial(taps, axis=2),
    "columns": partial(taps, axis=3),
    "winograd": winograd,
}

_ROUNDS = 5
_FILL = 0.01  # seconds of a round at least


def choose_rewrites(proto: onnx.ModelProto, worth: Worth) -> dict[str, int]:
    """Take every rewrite that is `worth` it, in place; how many of each kind there were."""
    return {name: count for name, found in PASSES.items() if (count := apply(proto, found, worth))}


class Stopwatch:
    """Measures rewrites, each shape of each kind once.

    threads: that compute a call, as the runtime will have them; 0 for every core.
    """

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads
        self.gains: dict[str, float] = {}

    def worth(self, view: View, rewrite: Rewrite) -> bool:
        """Whether the new nodes run faster than the old ones, at batch 1."""
        key = _key(view, rewrite)
        if key not in self.gains:
            self.gains[key] = self._gain(view, rewrite)
        return self.gains[key] > rewrite.margin

    def _gain(self, view: View, rewrite: Rewrite) -> float:
        """Times as fast, from rounds in which both take turns."""
        feeds = {name: _noise(view, name) for name in _read(view, rewrite.old)}
        runs = [self._session(view, rewrite, nodes) for nodes in (rewrite.old, rewrite.new)]
        best = [np.inf, np.inf]
        for session in runs:
            session.run(None, feeds)
        for _ in range(_ROUNDS):
            for index, session in enumerate(runs):
                started, calls = time.perf_counter(), 0
                while calls == 0 or time.perf_counter() - started < _FILL:
                    session.run(None, feeds)
                    calls += 1
                best[index] = min(best[index], (time.perf_counter() - started) / calls)
        return best[0] / best[1]

    def _session(self, view: View, rewrite: Rewrite, nodes: list[onnx.NodeProto]) -> Any:
        import onnxruntime

        names = {name for node in nodes for name in node.input}
        own = {tensor.name: tensor for tensor in rewrite.constants}
        constants = [tensor for name in names if (tensor := own.get(name) or view.proto(name)) is not None]
        inputs = [
            helper.make_tensor_value_info(name, view.types[name].elem_type, [1, *view.shape(name)[1:]])
            for name in _read(view, rewrite.old)
        ]
        outputs = [
            helper.make_tensor_value_info(name, view.types[name].elem_type, None) for name in _made(view, rewrite)
        ]
        graph = helper.make_graph(nodes, "form", inputs, outputs, constants)
        opset = helper.make_opsetid("", view.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=view.ir_version)
        runtime: Any = onnxruntime
        options = Settings().options(runtime, self.threads)
        return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _read(view: View, nodes: list[onnx.NodeProto]) -> list[str]:
    """Tensors that nodes take from elsewhere."""
    made = {name for node in nodes for name in node.output}
    read = [name for node in nodes for name in node.input if name and name not in made]
    return [name for name in dict.fromkeys(read) if view.proto(name) is None]


def _made(view: View, rewrite: Rewrite) -> list[str]:
    """Tensors that old nodes make for others."""
    inside = {id(node) for node in rewrite.old}
    made = [name for node in rewrite.old for name in node.output]
    return [n for n in made if view.is_result(n) or any(id(reader) not in inside for reader in view.readers(n))]


def _key(view: View, rewrite: Rewrite) -> str:
    """What decides over speed: operators, their settings and all shapes."""
    steps = [
        (node.op_type, [(a.name, str(helper.get_attribute_value(a))) for a in node.attribute])
        for node in (*rewrite.old, *rewrite.new)
    ]
    inputs = [view.shape(name)[1:] for name in _read(view, rewrite.old)]
    return repr((steps, inputs, [list(tensor.dims) for tensor in rewrite.constants]))


def _noise(view: View, name: str) -> Any:
    shape = [1, *view.shape(name)[1:]]
    return np.random.default_rng(0).standard_normal(shape).astype(view.dtype(name))
