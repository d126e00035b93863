"""A session of a torch model that is no bundle yet: what it draws and how it runs are as they will be exported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hflow_rt.manifest import BundledFile, Graph, Manifest
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.session import Session

if TYPE_CHECKING:
    from hflow_rt.models.family import LatentModel

__all__ = ["session_of"]


@dataclass(frozen=True)
class _InMemory(Bundle):
    tables: Mapping[str, dict[str, NDArray[np.floating]]] = field(default_factory=dict)

    def table(self, name: str) -> dict[str, NDArray[np.float32]]:
        return {key: array.astype(np.float32) for key, array in self.tables[name].items()}


def session_of(model: "LatentModel", family: str = "model") -> Session:
    """A session on the model's device, with the graphs of all its routes; nothing is written."""
    from hflow_rt.models.describe import described, described_tensor, tables_of
    from hflow_rt.runtime.engines.torch import TorchEngine

    specs, routes = model.graphs(), model.routes()
    unwritten = BundledFile(sha256="", bytes=0)
    tables = tables_of(model, routes)
    graphs = {
        name: Graph(
            file=name,
            inputs=tuple(described_tensor(tensor) for tensor in spec.inputs),
            outputs=tuple(described_tensor(tensor) for tensor in spec.outputs),
            batch=(1, 64),
            operators={},
        )
        for name, spec in specs.items()
    }
    manifest = Manifest(
        family=family,
        **described(model, routes, specs),
        graphs=graphs,
        opset=0,
        tools={},
        checkpoint={},
        files=dict.fromkeys([*specs, *tables], unwritten),
    )
    bundle = _InMemory(Path(), manifest, tables=tables)
    device = next(model.parameters()).device
    return Session(bundle, TorchEngine(bundle, {name: spec.module for name, spec in specs.items()}, device))
