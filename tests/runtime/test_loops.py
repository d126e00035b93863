"""Loops on every backend: the calls one by one are what it must give, whatever keeps the state between them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.bench.floor import work_of
from hflow_rt.bench.variants import BASELINE, cases_of, opened
from hflow_rt.export.bundle import export_bundle
from hflow_rt.files import sha256
from hflow_rt.manifest import MANIFEST, BundledFile, Engines, Loop, Plan, graph_sha256
from hflow_rt.models.checkpoint import save_model
from hflow_rt.models.family import LatentModel
from hflow_rt.models.registry import FAMILIES, Family, family
from hflow_rt.runtime import load, noise
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.engines import onnx as onnx_engine
from hflow_rt.runtime.engines import tensorrt as tensorrt_engine
from hflow_rt.runtime.engines.cuda import Gpu
from hflow_rt.runtime.inputs import inputs_of
from hflow_rt.runtime.noise import Stream
from hflow_rt.runtime.session import Session

sys.path += [str(Path(__file__).parents[1] / "models"), str(Path(__file__).parent / "engines")]
from fake_tensorrt import FakeCuda, FakeTensorRT

ADA = Gpu(0, "NVIDIA GeForce RTX 4090", "8.9", 24 << 30)
VERSION = "10.16.1.11"


@pytest.fixture(scope="module")
def bundle(tiny: Callable[[Family], LatentModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The toy of many steps, with plans that say no more than what they are of, for batches of 2 to 4."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, "toy-loop", "toy_loop")
        model = tiny(family("toy-loop"))
        folder = tmp_path_factory.mktemp("loop")
        save_model(folder / "model.safetensors", "toy-loop", model, model.state_dict(), {})
        images = np.random.default_rng(0).uniform(size=(3, 3, 8, 8)).astype(np.float32)
        manifest = export_bundle(folder / "model.safetensors", folder / "bundle", images)
        assert manifest.verified
        yield _with_plans(find_bundle(folder / "bundle"))


def _with_plans(bundle: Bundle) -> Bundle:
    manifest, plans, files = bundle.manifest, {}, dict(bundle.manifest.files)
    for name in manifest.graphs:
        for kind, content in ((".plan", name), (".layers.jsonl", "")):
            path = bundle.path / f"trt/KEY/{name}{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            files[f"trt/KEY/{name}{kind}"] = BundledFile(sha256=sha256(path), bytes=path.stat().st_size)
        plan, layers = (f"trt/KEY/{name}{kind}" for kind in (".plan", ".layers.jsonl"))
        plans[name] = Plan(file=plan, layers=layers, onnx=graph_sha256(manifest, name), types={}, seconds=1)
    engines = Engines(
        flavor="tensorrt", version=VERSION, gpu=ADA.name, capabilities=("8.9",), batch=(2, 2, 4), plans=plans
    )
    manifest = manifest.model_copy(update={"files": files, "engines": {"KEY": engines}})
    (bundle.path / MANIFEST).write_text(manifest.dump())
    return Bundle(bundle.path, manifest)


@pytest.fixture
def cuda(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(tensorrt_engine, "Cuda", lambda gpu: fake)
    monkeypatch.setattr(tensorrt_engine, "chosen_gpu", lambda: ADA)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(bundle, fake, VERSION))
    return fake


def one_by_one(session: Session, route: Any, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """A loop of the toy, written out in calls of its graphs."""
    loop = session.manifest.routes[route]
    assert isinstance(loop, Loop)
    tables = session.drawing.table(loop.schedule)
    begun = session.run_graph(loop.start, values)
    state, read = begun["u_next"], []
    for step in range(loop.steps):
        rows = {name: table[step : step + 1] for name, table in tables.items()}
        noise = {"noise": np.asarray(values["noise"])[:, step]} if "noise" in values else {}
        outputs = session.run_graph(loop.step, {"u": state, "image": values.get("image"), **rows, **noise})
        state = outputs["u_next"]
        read.append(outputs.get("z"))
    if route == "forward":
        return {"image": outputs["image"]}
    return {"start": begun["start"], "noise": np.stack(read, 1)}


@pytest.mark.parametrize("backend", ["onnx", "torch", "trt"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_loop_is_its_calls_one_by_one(bundle: Bundle, cuda: FakeCuda, backend: str, count: int) -> None:
    expected = load(bundle.path, device="cpu")
    with load(bundle.path, backend) as session:
        (latents,) = session.draw(range(count), seed=2)
        wanted = one_by_one(expected, "forward", latents)["image"]
        np.testing.assert_allclose(session.forward(latents), wanted, atol=1e-6)
        assert np.ptp(wanted, axis=0).max() > 0.01 or count == 1
        images = np.random.default_rng(count).uniform(size=(count, 3, 8, 8)).astype(np.float32)
        found, read = session.inverse(images).latents, one_by_one(expected, "inverse", {"image": images})
        assert found.keys() == {"start", "noise"}
        for name, values in read.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4)
        # the exact inverse: the noise that was read leads back
        np.testing.assert_allclose(session.forward(found), images, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_loop_that_is_shared_out_is_the_same_loop(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with load(bundle.path, device="cpu") as session:
        (latents,) = session.draw(range(count), seed=4)
        expected = session.forward(latents)
        read = session.inverse(expected).latents
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with load(bundle.path, device="cpu") as session:
        np.testing.assert_allclose(session.forward(latents), expected, atol=1e-6)
        assert np.ptp(expected, axis=0).max() > 0.01 or count == 1
        for name, values in session.inverse(expected).latents.items():
            np.testing.assert_allclose(values, read[name], atol=1e-4)
        opened = {alone for _, alone in session._engine._sessions}  # type: ignore[attr-defined]
        assert opened == {count >= 2}


def test_tensorrt_carries_on_the_device(bundle: Bundle, cuda: FakeCuda) -> None:
    """One upload of a row and of its noise for every call, nothing down before the last; recorded once, replayed."""
    session = load(bundle.path, "trt")
    (latents,) = session.draw([0, 1])
    session.forward(latents)
    cuda.calls.clear()
    session.forward(latents)
    names = cuda.names()
    start, steps = names[: names.index("download") + 2], names[names.index("download") + 2 :]
    assert "copy" not in start
    loop = session.manifest.routes["forward"]
    assert isinstance(loop, Loop)
    assert steps.count("launch") == steps.count("copy") == loop.steps
    assert steps.count("upload") == 2 + 2 * loop.steps  # u and delta once
    last = len(steps) - 1 - steps[::-1].index("launch")
    assert "download" not in steps[:last]
    assert "execute_async_v3" not in steps


def test_onnx_runtime_carries_by_binding(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of a loop hands arrays over: `run` of the session is for its start alone."""
    session = load(bundle.path, device="cpu")
    (latents,) = session.draw([0, 1, 2])
    expected = one_by_one(session, "forward", latents)["image"]
    ran = []
    real = onnx_engine.OnnxEngine._run
    monkeypatch.setattr(onnx_engine.OnnxEngine, "_run", lambda *given: ran.append(len(given[2].inputs)) or real(*given))
    np.testing.assert_array_equal(session.forward(latents), expected)
    assert ran == [1]


def test_noise_is_drawn_a_step_at_a_time(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(bundle.path, device="cpu")
    (latents,) = session.draw([3, 8], seed=4)
    stream = latents["noise"]
    assert isinstance(stream, Stream)
    assert stream.shape == (2, 4, 3, 8, 8)
    whole = np.asarray(stream)
    np.testing.assert_array_equal(whole[1:, 2], noise.draw_noise("noise", "noise", (3, 8, 8), 4, [8], 2))
    np.testing.assert_array_equal(np.asarray(stream[1:]), whole[1:])
    np.testing.assert_array_equal(2 * stream + 1, 2 * whole + 1)
    expected = session.forward({**latents, "noise": whole})
    monkeypatch.setattr(Stream, "__array__", lambda *_: pytest.fail("all of it at once"))
    np.testing.assert_array_equal(session.forward(latents), expected)


def test_tensors_come_back_as_tensors(bundle: Bundle) -> None:
    session = load(bundle.path, device="cpu")
    (latents,) = session.draw([0, 1])
    given = {name: torch.from_numpy(np.array(values)) for name, values in latents.items()}
    found = session.forward(given)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), session.forward(latents))


@pytest.mark.parametrize("route", ["forward", "inverse"])
def test_latency_rows_run_the_same_loop(bundle: Bundle, route: Any) -> None:
    """What is measured is the route: by torch, unfolded, and by ONNX Runtime."""
    graphs = [*bundle.manifest.graphs]
    assert cases_of(bundle.manifest, "both") == [*graphs, "forward", "inverse"]
    loop = bundle.manifest.routes[route]
    assert isinstance(loop, Loop)
    assert cases_of(bundle.manifest, route) == [*loop.graphs, route]
    values = inputs_of(bundle, route, 2, seed=1)
    expected = [*load(bundle.path, device="cpu").run(route, values).values()]
    for name in (BASELINE, "onnx"):
        running = opened(name).open(bundle)
        found = running.host(running.call(route, running.place(values)))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert work_of(bundle, route).operations == sum(
        times * work_of(bundle, name).operations for name, times in zip(loop.graphs, (1, loop.steps), strict=True)
    )
