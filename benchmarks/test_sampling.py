"""Models of many steps: what a step costs beside the plain network, and what the loop around it costs.

`pytest benchmarks/test_sampling.py --report sampling` takes a few minutes. Every title says what is aimed at: that the
last variant is so many times as fast as the first.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import exported_like, trained_like
from test_inference import MEASURED
from torch import Tensor

from hflow_rt.models.ihdm.blur import damping
from hflow_rt.models.ihdm.graphs import level_table
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.inputs import inputs_of

PRESETS = ("ihdm-demo", "ihdm-mnist-small")
BATCHES = (1, 16)
STEP = 20  # the level that is measured; all cost the same


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns of what it uses itself
@pytest.mark.parametrize("preset", PRESETS)
def test_step(benchmark: Any, preset: str, exported: Any, against: Any) -> None:
    """One step by ONNX Runtime against the network as it trains, which makes its level's biases in every call."""
    model, folder = exported(preset, "forward")
    session, bundle = load(folder, "onnx", "cpu"), find_bundle(folder)

    def step(u: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        mean: Tensor = model.mean(u, level)
        return mean + model.config.delta * noise

    for batch in BATCHES:
        values = inputs_of(bundle, "step", batch, 0)
        level = torch.full((batch,), STEP)
        values["level"] = level_table(model.network)[STEP : STEP + 1].numpy()
        inputs = torch.from_numpy(values["u"]), level, torch.from_numpy(values["noise"])
        compiled = torch.compile(step, dynamic=False)

        def plain(run: Callable[..., Tensor], inputs: Any = inputs) -> Tensor:
            with torch.no_grad():
                return run(*inputs)

        def runtime(values: Any = values) -> Any:
            return session.run_graph("step", values)["u_next"]

        close = (torch.from_numpy(runtime()) - plain(step)).abs().max()
        assert close < 1e-4, close  # the same step, or the figures compare nothing
        variants = {
            "plain network": lambda plain=plain: plain(step),
            "torch.compile": lambda plain=plain, compiled=compiled: plain(compiled),
            "ONNX Runtime": runtime,
        }
        against(f"{preset} step, batch {batch}", variants, {"plain network": 2, "torch.compile": 1.3})
        if batch == BATCHES[0]:
            benchmark.pedantic(runtime, rounds=5, iterations=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_loop(benchmark: Any, preset: str, exported: Any, take_turns: Any, record: Any) -> None:
    """A whole sample, noise and all, against as many calls of its step on inputs that are there."""
    model, folder = exported(preset, "forward")
    session, bundle, steps = load(folder, "onnx", "cpu"), find_bundle(folder), model.config.steps
    for batch in BATCHES:
        values = inputs_of(bundle, "step", batch, 0)

        def alone(values: Any = values) -> None:
            for _ in range(steps):
                session.run_graph("step", values)

        def sample(batch: int = batch) -> Any:
            return session.sample(batch, seed=0)

        seconds = take_turns({f"{steps} steps alone": alone, "sample": sample}, 3)
        record(f"{preset} sample, batch {batch}, aim 0.95x", seconds)
        if batch == BATCHES[0]:
            benchmark.pedantic(sample, rounds=2, iterations=1)


def test_memory(benchmark: Any, take_turns: Any, record: Any, tmp_path: Path) -> None:
    """Peak memory of `hflow-rt sample` with few steps and with many, whose noise alone would be 79 MB."""
    small = ["model.widths=[1]", "model.attention=[]"]
    for steps in (50, 400):
        folder = tmp_path / str(steps)
        folder.mkdir()
        _, bundle = exported_like("ihdm-demo", folder, "forward", [*small, f"model.steps={steps}"])
        output = folder / "samples"
        command = [sys.executable, "-c", MEASURED, str(bundle), "-n", "16", "--device", "cpu", "-o", str(output)]

        def run(command: Any = command) -> dict[str, Any]:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
            measured: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
            return measured

        measured = run()
        record(f"sample -n 16 of {steps} steps, whole process", take_turns({"ONNX Runtime": run}, 2), **measured)
    benchmark.pedantic(run, rounds=1, iterations=1)


def _cosines(x: Tensor) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of the last axis by a Fourier transform of as many numbers."""
    side = x.shape[-1]
    found = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    turn = torch.polar(torch.ones(side), -math.pi / (2 * side) * torch.arange(side))
    scale = torch.full((side,), math.sqrt(2 / side))
    scale[0] = math.sqrt(1 / side)
    return (found * turn).real * scale


def _from_cosines(c: Tensor) -> Tensor:
    """Undoes `_cosines`."""
    side = c.shape[-1]
    scale = torch.full((side,), math.sqrt(side / 2))
    scale[0] = math.sqrt(side)
    waves = c * scale
    mirrored = torch.cat([torch.zeros_like(waves[..., :1]), waves[..., 1:].flip(-1)], -1)
    turn = torch.polar(torch.ones(side), math.pi / (2 * side) * torch.arange(side))
    found = torch.fft.ifft(torch.complex(waves, -mirrored) * turn).real
    x = torch.empty_like(c)
    x[..., ::2], x[..., 1::2] = found[..., : (side + 1) // 2], found[..., (side + 1) // 2 :].flip(-1)
    return x


@pytest.mark.parametrize("preset", PRESETS)
def test_blur(benchmark: Any, preset: str, take_turns: Any, record: Any) -> None:
    """16 images, each to its own level: two products with small matrices, and cosine transforms there and back."""
    model = trained_like(preset)
    images = torch.rand(16, *model.config.image_shape)
    level, rates = torch.arange(16) + STEP, damping(model.config).float()

    def by_matrices() -> Tensor:
        blurred: Tensor = model.blur(images, level)
        return blurred

    def by_fourier() -> Tensor:
        waves = _cosines(_cosines(images).mT).mT
        damped = waves * (rates[level][:, None, :, None] * rates[level][:, None, None, :])
        return _from_cosines(_from_cosines(damped).mT).mT

    assert (by_matrices() - by_fourier()).abs().max() < 1e-5
    seconds = take_turns({"cosine transform": by_fourier, "matrices": by_matrices}, 9, 0.2)
    record(f"{preset} blur of 16, aim 5x", seconds)
    benchmark.pedantic(by_matrices, rounds=5, iterations=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_level_table(benchmark: Any, preset: str, take_turns: Any, record: Any) -> None:
    """The biases of a level made anew, and a row of the table; `products` are the matrix products that this spares."""
    model = trained_like(preset)
    level, table = torch.full((1,), STEP), level_table(model.network)

    @torch.no_grad()
    def made() -> Tensor:
        biases: Tensor = model.network.level_biases(level)
        return biases

    products = sum(isinstance(module, torch.nn.Linear) for module in model.network.embedding)
    products += len(model.network.blocks())
    seconds = take_turns({"made anew": made, "row of a table": lambda: table[STEP : STEP + 1]}, 9, 0.1)
    record(f"{preset} level", seconds, products=products)
    benchmark.pedantic(made, rounds=5, iterations=1)
