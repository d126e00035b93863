"""Both ways between noise and image by ONNX Runtime, against the model as it is written, eager and compiled.

`pytest benchmarks/test_routes.py --report nvae_speed` takes half an hour, most of it for the preset of 131 million
parameters; `-k nvae-demo` takes a few minutes. Every title says what is aimed at: that ONNX Runtime is so many times as
fast as the other. The model as it is written computes the norms of its weights and masks them in every call.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hflow_rt.runtime import load
from hflow_rt.runtime.inputs import inputs_of

AIMS = {
    "forward": {"plain model": 2.5, "torch.compile": 1.3},
    "inverse": {"plain model": 2.0, "torch.compile": 1.2},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns of what it uses itself
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("route", list(AIMS))
@pytest.mark.parametrize("preset", ["nvae-demo", "nvae-cifar"])
def test_route(benchmark: Any, preset: str, route: str, batch: int, exported: Any, against: Any) -> None:
    """The latents of a bundle's own std, and pictures whose posterior's mean is taken."""
    model, folder = exported(preset)
    session = load(folder, "onnx", "cpu")
    values = inputs_of(session.bundle, route, batch, 0)
    values |= {name: np.zeros_like(value) for name, value in values.items() if name.startswith("noise")}
    plain = model.graphs()[route].reference
    compiled = torch.compile(plain, dynamic=False)
    inputs = [torch.from_numpy(values[tensor.name]) for tensor in session.manifest.graphs[route].inputs]

    def by(run: Any) -> Tensor:
        with torch.inference_mode():
            first: Tensor = run(*inputs)[0]
            return first

    def runtime() -> Any:
        return session.run_graph(route, values)

    name = session.manifest.graphs[route].outputs[0].name
    close = (torch.from_numpy(runtime()[name]) - by(plain)).abs().max()
    assert close < 1e-3, close  # the same numbers, or the figures compare nothing
    variants = {"plain model": lambda: by(plain), "torch.compile": lambda: by(compiled), "ONNX Runtime": runtime}
    against(f"{preset} {route}, batch {batch}", variants, AIMS[route])
    benchmark.pedantic(runtime, rounds=3, iterations=1)
