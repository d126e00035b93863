"""What a backend implements: run a graph, or all calls of a loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hflow_rt.choices import Precision
from hflow_rt.manifest import Graph
from hflow_rt.runtime.bundle import Bundle

__all__ = ["Calls", "Engine", "called", "looped"]

Values = Mapping[str, Any]  # arrays by name


@dataclass(frozen=True)
class Calls:
    """All calls of a loop on at most one batch of images: those of `graph`, one for each of `rows`.

    first: inputs of the first call beside its row. rows: what is new in each call. carry: output to the input that it
    becomes. every: outputs that are wanted of every call; of the last all are.
    """

    graph: str
    first: Values
    rows: Iterable[Values]
    carry: Mapping[str, str]
    every: Collection[str]

    @property
    def batch(self) -> int:
        """How many images."""
        return max(len(array) for array in self.first.values())

    @property
    def on_host(self) -> bool:
        """Whether what is given are numpy arrays, not tensors where the engine has them."""
        return all(isinstance(array, np.ndarray) for array in self.first.values())


class Engine(ABC):
    """What a backend implements: run one graph on float32 arrays in the graph's order."""

    precision: Precision | None = None  # of the arithmetic, where that is not as the graphs were written
    key: str | None = None  # of the TensorRT engines, see the manifest
    largest: int | None = None  # batch of one call, where that is not what the graphs say
    tensors: str | None = (
        None  # the device, such as `cuda:0`, whose torch tensors `run` takes and yields where they are
    )
    side_by_side = False  # whether several calls together keep more processors busy than one after the other

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    @property
    @abstractmethod
    def backend(self) -> str:
        """What really runs, e.g. `onnxruntime CPUExecutionProvider`."""

    @property
    def graphs(self) -> Collection[str]:
        """What it can run."""
        return self._bundle.manifest.graphs

    @property
    def verified(self) -> bool:
        """Whether this very engine was proved to be the model, as far as the bundle knows."""
        return self._bundle.manifest.verified

    @abstractmethod
    def run(self, graph: str, inputs: Sequence[Any]) -> list[Any]:
        """Outputs of `graph`, of the kind of the inputs. Raises `BundleError` where the bundle lacks it."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds on a GPU. Once closed it does not run again."""

    def loop(self, calls: Calls) -> Iterator[Values]:
        """Outputs by name of every call; a backend keeps what is carried where it computes."""
        return looped(called(self.run, calls.graph, self._bundle.manifest.graphs[calls.graph]), calls)


def called(run: Callable[[str, list[Any]], list[Any]], name: str, graph: Graph) -> Callable[[Values], Values]:
    """`run` of a graph, as `looped` takes it: values by name to outputs by name."""

    def call(values: Values) -> Values:
        outputs = run(name, [values[tensor.name] for tensor in graph.inputs])
        return {tensor.name: output for tensor, output in zip(graph.outputs, outputs, strict=True)}

    return call


def looped(call: Callable[[Values], Values], calls: Calls) -> Iterator[Values]:
    """As `Engine.loop`, by a call of values by name to outputs by name."""
    state, outputs = dict(calls.first), None
    for row in calls.rows:
        if outputs is not None:
            yield {name: outputs[name] for name in calls.every}
        outputs = call({**state, **row})
        state |= {entered: outputs[left] for left, entered in calls.carry.items()}
    if outputs is not None:
        yield outputs
