"""The TensorRT backend against a machine that only seems to have a GPU: order of calls, memory, batches, failures."""

import gc
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hflow_rt.errors import BackendUnavailable, BundleError, EngineMismatch
from hflow_rt.files import sha256
from hflow_rt.manifest import MANIFEST, BundledFile, Engines, Plan, graph_sha256
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.engines import tensorrt as module
from hflow_rt.runtime.engines.cuda import Gpu
from hflow_rt.runtime.session import Session

pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parent))
from fake_tensorrt import FakeCuda, FakeTensorRT

ADA = Gpu(0, "NVIDIA GeForce RTX 4090", "8.9", 24 << 30)
R = 16
VERSION = "10.16.1.11"


@pytest.fixture(scope="module")
def onnx_session(tiny_run: Path) -> Session:
    return load(tiny_run, "onnx", "cpu")


@pytest.fixture
def bundle(tiny_run: Path, tmp_path: Path) -> Bundle:
    """The tiny bundle with plans, which say no more than what they are of, for batches of 2 to 4."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in (tiny_run / "bundle").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return with_plans(find_bundle(folder), "KEY")


def with_plans(bundle: Bundle, key: str, **changes: Any) -> Bundle:
    manifest, plans, files = bundle.manifest, {}, dict(bundle.manifest.files)
    for name in ("forward", "inverse"):
        place = f"trt/{key}/{name}"
        for kind, content in ((".plan", name), (".layers.jsonl", "")):
            path = bundle.path / (place + kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            files[place + kind] = BundledFile(sha256=sha256(path), bytes=path.stat().st_size)
        plans[name] = Plan(
            file=f"{place}.plan", layers=f"{place}.layers.jsonl", onnx=graph_sha256(manifest, name), types={}, seconds=1
        )
    settings = {"flavor": "tensorrt", "version": VERSION, "gpu": ADA.name, "capabilities": ("8.9",), "batch": (2, 2, 4)}
    engines = Engines(**(settings | {"plans": plans} | changes))
    manifest = manifest.model_copy(update={"files": files, "engines": manifest.engines | {key: engines}})
    (bundle.path / MANIFEST).write_text(manifest.dump())
    return Bundle(bundle.path, manifest)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(module, "Cuda", lambda gpu: fake)
    monkeypatch.setattr(module, "chosen_gpu", lambda: ADA)
    return fake


@pytest.fixture
def api(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(bundle, cuda, VERSION)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    return fake


@pytest.fixture
def session(bundle: Bundle, api: FakeTensorRT) -> Session:
    return load(bundle.path, "trt")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_any_batch(session: Session, onnx_session: Session, cuda: FakeCuda, count: int) -> None:
    """Fewer than the profile's least are padded, more than its most are split."""
    found, expected = session.sample(count, 0.7, 1), onnx_session.sample(count, 0.7, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    shapes = {call[2][0] for call in cuda.calls if call[0] == "set_input_shape"}
    assert shapes == {1: {2}, 2: {2}, 3: {3}, 4: {4}, 5: {4, 2}, 9: {4, 2}}[count]
    encoded, wanted = session.inverse(expected), onnx_session.inverse(expected)
    for name, values in wanted.latents.items():
        np.testing.assert_allclose(encoded.latents[name], values, atol=1e-4)
    np.testing.assert_allclose(encoded.log_prob, wanted.log_prob, rtol=1e-5)


def test_what_it_is(session: Session, bundle: Bundle) -> None:
    assert session.backend == f"TensorRT {VERSION} on {ADA.name}"
    assert session.engines == "KEY"
    assert set(session.graphs) == {"forward", "inverse"}
    assert bundle.manifest.verified
    assert not session.verified
    with pytest.raises(BundleError, match=r"no TensorRT engine of 'end_forward' \(there is: forward, inverse\)"):
        session.into_space("y0", session.inverse(np.zeros((1, 3, R, R), np.float32)).latents)


def test_order_of_calls(session: Session, cuda: FakeCuda) -> None:
    images = np.random.default_rng(0).uniform(0, 1, (3, 3, R, R)).astype(np.float32)
    outputs = len(session.latent_shapes) + 1
    session.inverse(images)
    first = cuda.names()
    assert first == [
        "Runtime", "deserialize_cuda_engine", "create_execution_context", "stream", "set_input_shape",
        *["allocate"] * (1 + outputs), "allocate_host", "upload", "execute_async_v3",
        *["allocate_host", "download"] * outputs, "synchronize",
    ]  # fmt: skip
    sizes = [4 * 3 * int(np.prod(shape)) for shape in session.latent_shapes.values()]
    expected = sorted([images.nbytes, *sizes, 4 * 3])
    assert sorted(call[1] for call in cuda.calls if call[0] == "allocate") == expected
    assert sorted(call[1] for call in cuda.calls if call[0] == "allocate_host") == expected

    # nothing is allocated again; the second run records a graph, later ones replay it
    for middle in (["begin_capture", "execute_async_v3", "end_capture", "launch"], ["launch"], ["launch"]):
        cuda.calls.clear()
        session.inverse(images)
        assert cuda.names() == ["upload", *middle, *["download"] * outputs, "synchronize"]


def test_a_graph_computes_what_comes_in(session: Session, onnx_session: Session) -> None:
    for seed in range(4):
        np.testing.assert_allclose(
            session.sample(3, 0.7, seed), onnx_session.sample(3, 0.7, seed), atol=1e-5, err_msg=str(seed)
        )


def test_without_a_cuda_graph(bundle: Bundle, api: FakeTensorRT, cuda: FakeCuda) -> None:
    session = load(bundle.path, "trt", cuda_graph=False)
    for _ in range(3):
        session.sample(2)
    assert Counter(cuda.names())["execute_async_v3"] == 3
    assert "begin_capture" not in cuda.names()
    with pytest.raises(BackendUnavailable, match="the torch backend has no CUDA graph"):
        load(bundle.path, "torch", cuda_graph=False)


@pytest.mark.parametrize(("wanted", "strategy"), [(True, "whole"), (False, "disabled")])
def test_rtx_captures_by_itself(
    bundle: Bundle, api: FakeTensorRT, cuda: FakeCuda, onnx_session: Session, wanted: bool, strategy: str
) -> None:
    bundle = with_plans(bundle, "RTX", flavor="rtx", gpu=None, capabilities=("8.6", "8.9"))
    session = load(bundle.path, "trt", cuda_graph=wanted)
    assert session.backend.startswith("TensorRT for RTX")
    for seed in range(3):
        np.testing.assert_allclose(session.sample(2, 0.7, seed), onnx_session.sample(2, 0.7, seed), atol=1e-5)
    assert set(api.strategies) == {strategy}
    assert "begin_capture" not in cuda.names()


def test_tensors_stay_on_the_gpu(
    session: Session, onnx_session: Session, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(session._engine, "tensors", "cpu")  # its memory is the GPU's here
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    images = np.random.default_rng(0).uniform(0, 1, (5, 3, R, R)).astype(np.float32)
    wanted = onnx_session.inverse(images)
    for given in (torch.from_numpy(images), torch.from_numpy(images).contiguous(memory_format=torch.channels_last)):
        cuda.calls.clear()
        found = session.inverse(given)
        for name, values in wanted.latents.items():
            assert isinstance(found.latents[name], torch.Tensor)
            np.testing.assert_allclose(found.latents[name].numpy(), values, atol=1e-4)
        names = Counter(cuda.names())
        assert not names.keys() & {"upload", "download", "allocate_host", "synchronize"}
        orders = [call[1:] for call in cuda.calls if call[0] == "order"]
        assert [77 in pair for pair in orders] == [True] * 4  # before and after, for each part
        assert orders[0][0] == orders[1][1] == 77
    image = session.forward(found.latents)
    np.testing.assert_allclose(image.numpy(), images, atol=1e-3)
    pixels = torch.from_numpy(np.rint(images * 255).astype(np.uint8)).permute(0, 2, 3, 1)
    assert session.inverse(pixels).log_prob.shape == (5,)


def test_threads_do_not_share_a_context(bundle: Bundle, api: FakeTensorRT, onnx_session: Session) -> None:
    session = load(bundle.path, "trt")
    expected = [onnx_session.sample(3, 0.7, seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: session.sample(3, 0.7, seed), range(24)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert 1 <= api.contexts <= 4


def test_release(bundle: Bundle, api: FakeTensorRT, cuda: FakeCuda) -> None:
    with load(bundle.path, "trt") as session:
        for count in (2, 3, 2, 2):
            session.sample(count)
        assert cuda.memory
        assert cuda.graphs
        assert api.contexts == 2
    assert not cuda.memory
    assert not cuda.streams
    assert not cuda.graphs
    assert api.contexts == 0
    session.close()
    with pytest.raises(BackendUnavailable, match="this session was closed; load the model again"):
        session.sample(1)


def test_what_nobody_holds_is_released(bundle: Bundle, api: FakeTensorRT, cuda: FakeCuda) -> None:
    load(bundle.path, "trt").sample(2)
    gc.collect()
    assert not cuda.memory
    assert api.contexts == 0


def test_few_batch_sizes_are_kept(bundle: Bundle, api: FakeTensorRT, cuda: FakeCuda) -> None:
    session = load(with_plans(bundle, "WIDE", batch=(1, 8, 16)).path, "trt")
    for count in range(1, 15):
        session.sample(count)
    assert api.contexts == module._IDLE
    assert len(cuda.streams) == module._IDLE


# failures


def test_a_plan_that_tensorrt_refuses(session: Session, api: FakeTensorRT, bundle: Bundle) -> None:
    api.refuse.add("deserialize")
    with pytest.raises(EngineMismatch) as caught:
        session.sample(1)
    assert str(caught.value) == (
        f"TensorRT {VERSION} refuses {bundle.path}/trt/KEY/forward.plan: magic tag does not match; build it again with"
        f" 'hflow-rt export {bundle.path} --engine trt --flavor tensorrt --batch 2:2:4'"
    )


@pytest.mark.parametrize(
    ("refused", "error", "text"),
    [
        ("names", EngineMismatch, "must have end0, end1, image, z0, z1, not other"),
        ("shapes", EngineMismatch, r"must have float end0 \[2, 1, 1\], not float \[2, 1, 1, 2\]"),
        ("types", EngineMismatch, r"not half \[2, 1, 1\]"),
        ("context", BackendUnavailable, "cannot make a context of batch 2: out of memory; use a smaller batch"),
        ("input_shape", EngineMismatch, "refuses a batch of 2 for 'end0'"),
        ("infer", EngineMismatch, "cannot take a batch of 2: no shapes"),
        ("execute", BackendUnavailable, "the TensorRT engine failed at batch 2: illegal memory access"),
    ],
)
def test_other_failures(
    session: Session, api: FakeTensorRT, cuda: FakeCuda, refused: str, error: type[Exception], text: str
) -> None:
    api.refuse.add(refused)
    with pytest.raises(error, match=text) as caught:
        session.sample(1)
    assert "\n" not in str(caught.value)
    assert not cuda.memory  # a lane that failed is not kept
    assert not cuda.streams
    api.refuse.clear()
    assert session.sample(1).shape == (1, 3, R, R)


def test_a_gpu_that_answers_no_more(session: Session, api: FakeTensorRT, cuda: FakeCuda) -> None:
    """The first failure is what is reported, not those of cleaning up after it."""
    api.refuse |= {"execute", "kill"}
    with pytest.raises(BackendUnavailable, match="illegal memory access"):
        session.sample(1)
    session.close()


def test_a_capture_that_fails(session: Session, api: FakeTensorRT, cuda: FakeCuda) -> None:
    session.sample(2)
    api.refuse.add("execute")
    with pytest.raises(BackendUnavailable, match=r"illegal memory access; try --no-cuda-graph"):
        session.sample(2)
    assert not cuda.recording
    assert not cuda.graphs
    assert not cuda.memory


# refusals, before TensorRT sees a byte


def refused(bundle: Bundle, error: type[Exception], *texts: str) -> None:
    with pytest.raises(error) as caught:
        load(bundle.path, "trt").sample(1)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


def test_no_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT is not even imported: its runtime would take the process down."""
    monkeypatch.setattr(module, "chosen_gpu", lambda: None)
    monkeypatch.setattr(module, "product", None)
    refused(bundle, BackendUnavailable, "none was found here", "use --backend onnx")


def test_the_cpu(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="TensorRT engines run on a GPU only"):
        load(bundle.path, "trt", "cpu")


def test_no_tensorrt(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    refused(bundle, BackendUnavailable, "TensorRT is missing or incomplete", "pip install 'hflow-rt[trt]'")


def test_no_plans(tiny_run: Path, cuda: FakeCuda, api: FakeTensorRT) -> None:
    bundle = find_bundle(tiny_run)
    refused(bundle, BundleError, "has no TensorRT engines; build them with 'hflow-rt export", "--engine trt'")


def _flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (_flip, "was changed after export"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "must be 7 bytes, not 5: it was cut or replaced"),
        (lambda path: path.unlink(), "has no trt/KEY/forward.plan"),
    ],
)
def test_a_plan_that_is_not_what_was_built(
    bundle: Bundle, api: FakeTensorRT, cuda: FakeCuda, harm: Callable[[Path], Any], text: str
) -> None:
    harm(bundle.path / "trt" / "KEY" / "forward.plan")
    rebuild = f"'hflow-rt export {bundle.path} --engine trt --flavor tensorrt --batch 2:2:4'"
    refused(bundle, BundleError, text, rebuild)
    assert "deserialize_cuda_engine" not in cuda.names()


@pytest.mark.parametrize(
    ("gpu", "changes", "texts"),
    [
        (ADA, {"version": "10.13.3.9"}, ["for version 10.13.3.9 and this is TensorRT 10.16.1.11"]),
        (
            Gpu(0, "NVIDIA H100", "9.0", 1),
            {},
            ["for compute capability 8.9 and NVIDIA H100 has 9.0", "--engine trt --flavor tensorrt --batch 2:2:4'"],
        ),
        (Gpu(0, "NVIDIA L4", "8.9", 1), {}, ["for NVIDIA GeForce RTX 4090 and this is NVIDIA L4"]),
        (
            Gpu(0, "NVIDIA RTX 2080", "7.5", 1),
            {"flavor": "rtx", "gpu": None, "capabilities": ("8.6", "8.9"), "workspace": 64},
            [
                "for compute capability 8.6, 8.9 and NVIDIA RTX 2080 has 7.5",
                "--compute-capability 7.5",
                "--workspace 64",
            ],
        ),
    ],
)
def test_a_plan_for_another_machine(
    bundle: Bundle,
    api: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    gpu: Gpu,
    changes: dict[str, Any],
    texts: list[str],
) -> None:
    monkeypatch.setattr(module, "chosen_gpu", lambda: gpu)
    refused(with_plans(bundle, "KEY", **changes), EngineMismatch, "the engines KEY do not fit: ", *texts)


def test_a_plan_of_another_graph(bundle: Bundle, api: FakeTensorRT) -> None:
    manifest = bundle.manifest
    other = manifest.files | {"inverse.onnx": manifest.files["forward.onnx"]}
    (bundle.path / MANIFEST).write_text(manifest.model_copy(update={"files": other}).dump())
    refused(bundle, EngineMismatch, "inverse was built from another inverse.onnx; build others with 'hflow-rt export")


def test_a_plan_of_the_other_product(bundle: Bundle, api: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refused(bundle, EngineMismatch, "they are for TensorRT and this is TensorRT for RTX", "--engine trt'")


def test_the_newest_that_fits_is_taken(bundle: Bundle, api: FakeTensorRT) -> None:
    bundle = with_plans(bundle, "NEWER", batch=(1, 1, 1))
    bundle = with_plans(bundle, "OTHER", version="9")
    assert load(bundle.path, "trt").engines == "NEWER"
