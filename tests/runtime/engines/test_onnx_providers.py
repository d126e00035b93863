"""ONNX Runtime's GPU providers, played by its CPU one: their options, CUDA graphs at fixed addresses, no fallback."""

import gc
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from hflow_rt.errors import BackendUnavailable
from hflow_rt.runtime import load
from hflow_rt.runtime.engines import cuda as driver
from hflow_rt.runtime.engines import onnx as module
from hflow_rt.runtime.engines.cuda import Gpu
from hflow_rt.runtime.session import Session

sys.path.insert(0, str(Path(__file__).parent))
from fake_tensorrt import FakeCuda

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
OPTIONS = {
    "device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}  # fmt: skip


class FakeRuntime:
    """A module like `onnxruntime`, with providers of its own choice: `record` and `replay` as CUDA's would."""

    __version__ = onnxruntime.__version__
    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, cuda: FakeCuda, *available: str) -> None:
        self.available, self.cuda = available, cuda
        self.asked: list[list[tuple[str, dict[str, str]]]] = []
        self.calls: list[tuple[str, str | None]] = []
        self.refuse = False
        self.falls_back = False
        fake = self

        class RunOptions:
            def __init__(self) -> None:
                self.graph: str | None = None

            def add_run_config_entry(self, key: str, value: str) -> None:
                assert key == "gpu_graph_id"
                self.graph = value

        class Binding:
            def __init__(self) -> None:
                self.inputs: dict[str, tuple[int, tuple[int, ...]]] = {}
                self.outputs: dict[str, tuple[int, tuple[int, ...]]] = {}

            def bind_input(self, *, name: str, shape: tuple[int, ...], buffer_ptr: int, **place: Any) -> None:
                assert place == {"device_type": "cuda", "device_id": 0, "element_type": np.float32}
                self.inputs[name] = buffer_ptr, shape

            def bind_output(self, *, name: str, shape: tuple[int, ...], buffer_ptr: int, **place: Any) -> None:
                self.outputs[name] = buffer_ptr, shape

        class InferenceSession:
            def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
                fake.asked.append(providers)
                self.real = onnxruntime.InferenceSession(path, options, providers=[CPU])
                self.providers = [CPU] if fake.falls_back else [*(name for name, _ in providers), CPU]
                self.graphs = "enable_cuda_graph" in providers[0][1]
                self.recorded: dict[str, Any] = {}
                self.busy = False

            def get_providers(self) -> list[str]:
                return self.providers

            def io_binding(self) -> Binding:
                return Binding()

            def run(self, outputs: list[str], feeds: dict[str, Any], options: RunOptions | None = None) -> list[Any]:
                if self.graphs:  # without a number ONNX Runtime would record this
                    assert options is not None
                    assert options.graph == "-1"
                fake.calls.append(("run", options and options.graph))
                return self.real.run(outputs, feeds)  # type: ignore[no-any-return]

            def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
                assert not self.busy, "two threads run at once"
                self.busy = True
                assert options.graph is not None
                places = (binding.inputs, binding.outputs)
                fake.calls.append(("replay" if options.graph in self.recorded else "record", options.graph))
                assert self.recorded.setdefault(options.graph, places) == places, "addresses moved"
                if fake.refuse:
                    self.busy = False
                    raise RuntimeError("CUDA failure 900\nmore")
                feeds = {name: fake.seen(*place).copy() for name, place in binding.inputs.items()}
                for (_, place), result in zip(
                    binding.outputs.items(), self.real.run(list(binding.outputs), feeds), strict=True
                ):
                    fake.seen(*place)[...] = result
                self.busy = False

        self.RunOptions, self.InferenceSession = RunOptions, InferenceSession

    def seen(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        block = self.cuda.memory[address]
        assert block.nbytes == 4 * np.prod(shape)
        return block.view(np.float32).reshape(shape)

    def get_available_providers(self) -> list[str]:
        return [*self.available, CPU]


@pytest.fixture(scope="module")
def expected(tiny_run: Path) -> Session:
    return load(tiny_run, "onnx", "cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(driver, "Cuda", lambda gpu: fake)
    monkeypatch.setattr(driver, "chosen_gpu", lambda: Gpu(0, "NVIDIA L4", "8.9", 1))
    return fake


@pytest.fixture
def runtime(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime(cuda, TENSORRT, CUDA)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return fake


# CUDA graphs


def test_fixed_addresses_for_each_batch_size(tiny_run: Path, runtime: FakeRuntime, expected: Session) -> None:
    session = load(tiny_run, "onnx", "cuda", cuda_graph=True)
    assert session.backend == f"onnxruntime {CUDA} with a CUDA graph"
    for seed in range(3):
        for count in (2, 3):
            np.testing.assert_allclose(session.sample(count, 0.7, seed), expected.sample(count, 0.7, seed), atol=1e-5)
    assert runtime.asked == [[(CUDA, OPTIONS | {"enable_cuda_graph": "1"})]]
    assert runtime.calls == [("record", "1"), ("record", "2"), *[("replay", "1"), ("replay", "2")] * 2]
    images = expected.sample(2, 0.7)
    encoded, wanted = session.inverse(images), expected.inverse(images)
    np.testing.assert_allclose(encoded.log_prob, wanted.log_prob, rtol=1e-5)
    assert runtime.calls[-1] == ("record", "3")  # numbers are never used twice


def test_copies_and_waiting(tiny_run: Path, runtime: FakeRuntime, cuda: FakeCuda, expected: Session) -> None:
    session = load(tiny_run, "onnx", "auto", cuda_graph=True)  # which is CUDA then
    images = expected.sample(3, 0.7)
    session.inverse(images)
    cuda.calls.clear()
    session.inverse(images)
    outputs = len(session.latent_shapes) + 1
    # ONNX Runtime has a stream of its own: it starts when the copies are there, and is done when it returns
    assert cuda.names() == ["upload", "synchronize", *["download"] * outputs, "synchronize"]


def test_tensors_stay_on_the_gpu(
    tiny_run: Path, runtime: FakeRuntime, cuda: FakeCuda, expected: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    session = load(tiny_run, "onnx", "cuda", cuda_graph=True)
    monkeypatch.setattr(session._engine, "tensors", "cpu")  # its memory is the GPU's here
    images = expected.sample(3, 0.7)
    found, wanted = session.inverse(torch.from_numpy(images)), expected.inverse(images)
    np.testing.assert_allclose(found.latents["z0"].numpy(), wanted.latents["z0"], atol=1e-4)
    assert not set(cuda.names()) & {"upload", "download"}
    orders = [call[1:] for call in cuda.calls if call[0] == "order"]
    assert (orders[0][0], orders[1][1]) == (77, 77)


def test_few_batch_sizes_are_recorded(tiny_run: Path, runtime: FakeRuntime, expected: Session) -> None:
    session = load(tiny_run, "onnx", "cuda", cuda_graph=True)
    for count in range(1, 11):
        np.testing.assert_allclose(session.sample(count, 0.7), expected.sample(count, 0.7), atol=1e-5)
    assert Counter(kind for kind, _ in runtime.calls) == {"record": module._RECORDED, "run": 2}


def test_threads_take_turns(tiny_run: Path, runtime: FakeRuntime, expected: Session) -> None:
    session = load(tiny_run, "onnx", "cuda", cuda_graph=True)
    wanted = [expected.sample(3, 0.7, seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: session.sample(3, 0.7, seed), range(12)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_release(tiny_run: Path, runtime: FakeRuntime, cuda: FakeCuda) -> None:
    with load(tiny_run, "onnx", "cuda", cuda_graph=True) as session:
        session.sample(2)
        assert cuda.memory
    assert not cuda.memory
    assert not cuda.streams
    load(tiny_run, "onnx", "cuda", cuda_graph=True).sample(2)
    gc.collect()
    assert not cuda.memory


def test_a_run_that_fails(tiny_run: Path, runtime: FakeRuntime, cuda: FakeCuda) -> None:
    session = load(tiny_run, "onnx", "cuda", cuda_graph=True)
    runtime.refuse = True
    with pytest.raises(BackendUnavailable) as caught:
        session.sample(2)
    assert str(caught.value) == "ONNX Runtime failed at batch 2: CUDA failure 900; try without --cuda-graph"
    assert not cuda.memory
    runtime.refuse = False
    assert session.sample(2).shape == (2, 3, 16, 16)
    assert runtime.calls[-1] == ("record", "2")


@pytest.mark.parametrize("cuda_graph", [None, False])
def test_none_unless_asked_for(tiny_run: Path, runtime: FakeRuntime, cuda: FakeCuda, cuda_graph: bool | None) -> None:
    load(tiny_run, "onnx", "cuda", cuda_graph=cuda_graph).sample(2)
    assert runtime.asked == [[(CUDA, OPTIONS)]]
    assert runtime.calls == [("run", None)]
    assert not cuda.calls


def test_where_there_can_be_none(tiny_run: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "tensorrt"):
        with pytest.raises(BackendUnavailable, match=f"--cuda-graph is for --device cuda, not {device}"):
            load(tiny_run, "onnx", device, cuda_graph=True)
    monkeypatch.setattr(driver, "chosen_gpu", lambda: None)
    with pytest.raises(BackendUnavailable, match="--cuda-graph needs an NVIDIA GPU and none was found"):
        load(tiny_run, "onnx", "cuda", cuda_graph=True)


# TensorRT's providers


@pytest.mark.parametrize(("device", "provider", "prefix"), [("tensorrt", TENSORRT, "trt"), ("rtx", RTX, "nv")])
def test_tensorrt_by_name(
    tiny_run: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, device: str, provider: str, prefix: str
) -> None:
    runtime.available = (provider, CUDA)
    with pytest.raises(BackendUnavailable, match=f"{provider} would compute in TF32.*set NVIDIA_TF32_OVERRIDE=0"):
        load(tiny_run, "onnx", device)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    session = load(tiny_run, "onnx", device)
    assert session.backend == f"onnxruntime {provider}"
    session.inverse(np.zeros((1, 3, 16, 16), np.float32))
    shapes = {f"{prefix}_profile_{which}_shapes": f"image:{size}x3x16x16" for which, size in
              (("min", 1), ("opt", 16), ("max", 64))}  # fmt: skip
    assert runtime.asked == [[(provider, {"device_id": "0"} | shapes), (CUDA, OPTIONS)]]
    session.sample(1)
    assert runtime.asked[-1][0][1][f"{prefix}_profile_max_shapes"].startswith("end0:64x2x1x1,end1:64x6x1x1,")


@pytest.mark.parametrize(
    ("device", "provider", "hint"),
    [
        ("tensorrt", TENSORRT, "pip install 'hflow-rt[gpu]' 'tensorrt<11', or use --device cuda"),
        ("rtx", RTX, "no package of ONNX Runtime has it, build one that does, or use --backend trt --device cuda"),
    ],
)
def test_tensorrt_that_is_not_there(
    tiny_run: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, device: str, provider: str, hint: str
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    runtime.available = (CUDA,)
    with pytest.raises(BackendUnavailable) as caught:
        load(tiny_run, "onnx", device)
    assert str(caught.value) == f"{provider} is not in this ONNX Runtime; {hint}"
    runtime.available, runtime.falls_back = (provider, CUDA), True
    with pytest.raises(BackendUnavailable) as caught:
        load(tiny_run, "onnx", device).sample(1)
    assert str(caught.value).startswith(f"{provider} does not start here (ONNX Runtime fell back to {CPU}); it needs")
    assert str(caught.value).endswith(hint)


def test_auto_is_never_tensorrt(tiny_run: Path, runtime: FakeRuntime) -> None:
    assert load(tiny_run).backend == f"onnxruntime {CUDA}"
    with pytest.raises(BackendUnavailable, match="device 'tensorrt' is for the onnx backend, not for torch"):
        load(tiny_run, "torch", "tensorrt")
