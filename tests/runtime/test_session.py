"""Sessions: every backend the same answer, any batch, both kinds of arrays, and no fallback."""

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from hflow_rt.errors import BackendUnavailable, BundleError, DataError
from hflow_rt.runtime import BACKENDS, Session, load
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.engines.onnx import OnnxEngine
from hflow_rt.runtime.images.pictures import to_uint8

ON_CPU = sorted(BACKENDS.keys() - {"trt"})  # TensorRT needs a GPU

R = 16
SHAPES = {"end0": (2, 1, 1), "end1": (6, 1, 1), "z1": (4, 8, 8), "z0": (3, R, R)}
CUDA = "CUDAExecutionProvider"
CUDA_OPTIONS = {
    "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"
}  # fmt: skip
# rounding of float32 through some twenty layers; the parity report of the same bundle stays below it
CLOSE = 2e-5


@pytest.fixture(scope="module")
def sessions(tiny_run: Path) -> dict[str, Session]:
    return {backend: load(tiny_run, backend, "cpu") for backend in ON_CPU}


@pytest.fixture(params=ON_CPU)
def session(request: pytest.FixtureRequest, sessions: dict[str, Session]) -> Session:
    return sessions[request.param]


def pictures(batch: int, seed: int = 0) -> NDArray[np.float32]:
    """Smooth images `[B, 3, R, R]` in [0, 1]: each corner a colour of its own."""
    corners = np.random.default_rng(seed).uniform(0, 1, (batch, 3, 2, 2))
    ramp = np.stack([np.linspace(1, 0, R), np.linspace(0, 1, R)])
    return np.einsum("bcij,ih,jw->bchw", corners, ramp, ramp).astype(np.float32)


def latents(session: Session, batch: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    return next(session.draw(range(batch), 0.7, seed, batch))


# what a session says of itself


def test_a_session_describes_itself(sessions: dict[str, Session]) -> None:
    for session in sessions.values():
        assert session.latent_shapes == SHAPES
        assert session.resolution == R
        assert session.joined() == (("end0", "end1"),)
        assert session.joined("y0") == (("u0", "u1"),)
        assert session.space_shapes("y0") == {"u0": (2,), "u1": (6,), "z1": (4, 8, 8), "z0": (3, R, R)}
    assert sessions["onnx"].backend == "onnxruntime CPUExecutionProvider"
    assert sessions["torch"].backend == "torch cpu"


# one answer


@pytest.mark.parametrize("batch", [1, 3])
def test_backends_agree(sessions: dict[str, Session], batch: int) -> None:
    images = pictures(batch)
    onnx, torch_ = (sessions[name].inverse(images) for name in ("onnx", "torch"))
    for name, shape in SHAPES.items():
        assert onnx.latents[name].shape == (batch, *shape)
        assert onnx.latents[name].dtype == torch_.latents[name].dtype == np.float32
        scale = np.abs(torch_.latents[name]).max()
        assert np.abs(onnx.latents[name] - torch_.latents[name]).max() < CLOSE * max(1, scale)
    np.testing.assert_allclose(onnx.log_prob, torch_.log_prob, rtol=1e-5)
    assert onnx.log_prob.shape == (batch,)
    drawn = latents(sessions["onnx"], batch)
    first, second = (sessions[name].forward(drawn) for name in ("onnx", "torch"))
    assert first.shape == (batch, 3, R, R)
    assert first.min() >= 0
    assert first.max() <= 1
    assert np.abs(first - second).max() < CLOSE
    assert np.ptp(first) > 0.1  # a grey image would agree as well


def test_backends_agree_in_another_space(sessions: dict[str, Session]) -> None:
    drawn = latents(sessions["onnx"], 3)
    inside = {name: session.into_space("y0", drawn) for name, session in sessions.items()}
    assert list(inside["onnx"]) == ["u0", "u1", "z1", "z0"]
    for name in ("u0", "u1"):
        np.testing.assert_allclose(inside["onnx"][name], inside["torch"][name], atol=CLOSE)
    for name, session in sessions.items():
        back = session.from_space("y0", inside[name])
        assert list(back) == list(SHAPES)
        for latent in SHAPES:
            np.testing.assert_allclose(back[latent], drawn[latent], atol=CLOSE)


def test_round_trip(session: Session) -> None:
    pixels = to_uint8(pictures(4))
    back = session.forward(session.inverse(pixels).latents)
    np.testing.assert_array_equal(to_uint8(back), pixels)


# any batch


@pytest.mark.parametrize("batch", [1, 64, 65, 130])
def test_any_batch_size(session: Session, batch: int) -> None:
    """Beyond the largest batch of the graphs (64) a call is split, and nobody notices."""
    assert session.manifest.graphs["forward"].batch == (1, 64)
    images = pictures(batch)
    encoded = session.inverse(images)
    decoded = session.forward(encoded.latents)
    assert decoded.shape == images.shape
    assert encoded.log_prob.shape == (batch,)
    last = session.inverse(images[-1:])
    for name in SHAPES:
        np.testing.assert_allclose(encoded.latents[name][-1:], last.latents[name], atol=1e-4)
    np.testing.assert_allclose(decoded[-1:], session.forward(last.latents), atol=1e-4)


def test_no_call_exceeds_the_graph(sessions: dict[str, Session], tiny_run: Path) -> None:
    class Recorder(OnnxEngine):
        calls: list[int] = []  # noqa: RUF012

        def run(self, graph: str, inputs: Any) -> list[NDArray[np.float32]]:
            self.calls.append(len(inputs[0]))
            return [np.zeros((len(inputs[0]), 3, R, R), np.float32)]

    session = Session(find_bundle(tiny_run), Recorder(find_bundle(tiny_run), "cpu", onnxruntime))
    assert session.forward(latents(sessions["onnx"], 130)).shape == (130, 3, R, R)
    assert Recorder.calls == [64, 64, 2]


# same seed, same image


def test_an_image_depends_on_seed_and_index_alone(sessions: dict[str, Session]) -> None:
    whole = sessions["onnx"].sample(5, 0.8, seed=3)
    for backend, session in sessions.items():
        for batch in (1, 2, 5):
            parts = [session.forward(part) for part in session.draw(range(5), 0.8, 3, batch)]
            assert [len(part) for part in parts] == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[batch]
            np.testing.assert_allclose(np.concatenate(parts), whole, atol=CLOSE, err_msg=backend)
        alone = session.forward(next(session.draw([4], 0.8, 3)))
        np.testing.assert_array_equal(to_uint8(alone)[0], to_uint8(whole)[4])
    other = sessions["onnx"].sample(5, 0.8, seed=4)
    assert np.abs(other - whole).max() > 0.05


def test_latents_are_equal_bit_for_bit_on_every_backend(sessions: dict[str, Session]) -> None:
    drawn = [latents(session, 4, seed=9) for session in sessions.values()]
    for name in SHAPES:
        np.testing.assert_array_equal(drawn[0][name], drawn[1][name])


def test_std_is_by_level(session: Session) -> None:
    plain, narrow = (next(session.draw(range(2), std, 0)) for std in (1.0, ["0.5", "z0=0.25"]))
    for name in SHAPES:
        factor = 0.25 if name == "z0" else 0.5
        np.testing.assert_allclose(narrow[name], factor * plain[name], rtol=1e-6)


# kinds of arrays


def test_uint8_is_float_by_255(session: Session) -> None:
    pixels = to_uint8(pictures(2))
    floats = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    a, b = session.inverse(pixels), session.inverse(floats)
    np.testing.assert_array_equal(a.log_prob, b.log_prob)
    for name in SHAPES:
        np.testing.assert_array_equal(a.latents[name], b.latents[name])


def test_torch_in_torch_out(session: Session) -> None:
    images = torch.from_numpy(pictures(2)).requires_grad_()
    encoded = session.inverse(images)
    assert isinstance(encoded.log_prob, torch.Tensor)
    decoded = session.forward(encoded.latents)
    assert isinstance(decoded, torch.Tensor)
    assert decoded.dtype == torch.float32
    assert decoded.device == images.device
    expected = session.inverse(images.detach().numpy())
    np.testing.assert_array_equal(encoded.latents["z0"].numpy(), expected.latents["z0"])
    assert isinstance(expected.log_prob, np.ndarray)
    pixels = torch.from_numpy(to_uint8(pictures(1)))
    assert isinstance(session.inverse(pixels).latents["end0"], torch.Tensor)


def test_read_only_and_strided_arrays(session: Session) -> None:
    images = pictures(4)
    images.flags.writeable = False
    expected = session.inverse(images).log_prob
    swapped = np.asarray(images.transpose(0, 2, 3, 1), order="C").transpose(0, 3, 1, 2)
    assert not swapped.flags.c_contiguous
    np.testing.assert_allclose(session.inverse(swapped).log_prob, expected, rtol=1e-6)
    np.testing.assert_allclose(session.inverse(images[::-1]).log_prob, expected[::-1], rtol=1e-5)


# refusals


NAN = pictures(1)
NAN[0, 0, 0, 0] = np.nan
WRONG_IMAGES = {
    "one image": (
        pictures(1)[0],
        r"images must be float32 \[B, 3, 16, 16\] or uint8 \[B, 16, 16, 3\], not \[3, 16, 16\]",
    ),
    "channels last": (pictures(1).transpose(0, 2, 3, 1), r"not \[1, 16, 16, 3\]"),
    "uint8, channels first": (np.zeros((1, 3, R, R), np.uint8), r"uint8 \[B, H, W, 3 or 1\]"),
    "uint8, another size": (np.zeros((1, 8, 8, 3), np.uint8), r"not \[1, 8, 8, 3\]"),
    "grey": (pictures(1)[:, :1], r"not \[1, 1, 16, 16\]"),
    "uint8, grey": (np.zeros((1, R, R, 1), np.uint8), r"uint8 \[B, 16, 16, 3\], not \[1, 16, 16, 1\]"),
    "none": (pictures(1)[:0], r"not \[0, 3, 16, 16\]"),
    "no uint8": (np.zeros((0, R, R, 3), np.uint8), "not empty"),
    "float64": (pictures(1).astype(np.float64), r"float32 in \[0, 1\] or uint8, not float64"),
    "int64": (np.zeros((1, 3, R, R), np.int64), "not int64"),
    "below 0": (pictures(1) - 1, r"must lie in \[0, 1\]; found values outside"),
    "above 1": (pictures(1) * 255, r"must lie in \[0, 1\]; found values outside"),
    "NaN": (NAN, r"must lie in \[0, 1\]; found values outside, NaN"),
    "a list": (pictures(1).tolist(), "must be all numpy or all torch, not list"),
    "bfloat16": (torch.zeros(1, 3, R, R, dtype=torch.bfloat16), "'image' must be float32.*not torch.bfloat16"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images(session: Session, case: str) -> None:
    images, message = WRONG_IMAGES[case]
    with pytest.raises(DataError, match=message) as caught:
        session.inverse(images)
    assert "\n" not in str(caught.value)


def wrong(name: str | None, value: Any) -> Any:
    def change(values: dict[str, Any]) -> dict[str, Any]:
        if value is None:
            return {n: v for n, v in values.items() if n != name}
        return {n: value(v) if name in (n, None) else v for n, v in values.items()}

    return change


def with_nan(values: NDArray[np.float32]) -> NDArray[np.float32]:
    changed = values.copy()
    changed.flat[0] = np.nan
    return changed


WRONG_LATENTS = {
    "missing": (wrong("z1", None), r"missing z1 \[4, 8, 8\]"),
    "shape": (wrong("z1", lambda v: v[:, :3]), r"z1 is \[3, 8, 8\] there and \[4, 8, 8\] in the model"),
    "batches": (wrong("z1", lambda v: v[:1]), "batch sizes 1, 2 where all must be equal"),
    "empty": (wrong(None, lambda v: v[:0]), "an empty batch"),
    "float64": (wrong("end0", lambda v: v.astype(np.float64)), "end0 is float64, not float32"),
    "NaN": (wrong("z0", with_nan), "z0 holds NaN"),
    "mixed kinds": (wrong("z0", torch.from_numpy), "all numpy or all torch, not Tensor and ndarray"),
    "extra": (lambda values: values | {"z7": values["z0"]}, r"unexpected z7 \[3, 16, 16\]"),
    "nothing": (lambda values: {}, "missing end0"),
}


@pytest.mark.parametrize("case", WRONG_LATENTS)
def test_wrong_latents(session: Session, case: str) -> None:
    change, message = WRONG_LATENTS[case]
    with pytest.raises(DataError, match=message) as caught:
        session.forward(change(latents(session, 2)))
    assert "\n" not in str(caught.value)


def test_wrong_values_of_a_space(session: Session) -> None:
    drawn = latents(session, 2)
    with pytest.raises(DataError, match="unknown space 'w' for this hflow model; known: z, y0"):
        session.into_space("w", drawn)
    with pytest.raises(DataError, match="missing end1"):
        session.into_space("y0", {n: v for n, v in drawn.items() if n != "end1"})
    with pytest.raises(DataError, match=r"these values of space y0: .*missing u0 \[2\]; missing u1 \[6\]"):
        session.from_space("y0", drawn)


@pytest.mark.parametrize("n", [0, -1])
def test_no_images(session: Session, n: int) -> None:
    with pytest.raises(DataError, match=f"at least 1, not {n}"):
        session.sample(n)
    with pytest.raises(DataError, match=f"the batch must be at least 1, not {n}"):
        next(session.draw([0], batch=n))


@pytest.mark.parametrize("std", [0, -0.5, float("nan"), float("inf"), "z0=0", {"end0": -1.0}])
def test_impossible_std(session: Session, std: Any) -> None:
    with pytest.raises(DataError, match="std must be a finite number > 0"):
        session.sample(1, std)


# no fallback


def test_unknown_names_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="unknown backend 'trt9'; known: onnx, trt, torch"):
        load(tmp_path / "nowhere", "trt9")
    with pytest.raises(BackendUnavailable, match="unknown device 'tpu'; known: auto, cpu, cuda"):
        load(tmp_path / "nowhere", "onnx", "tpu")


def test_a_provider_that_is_not_built_in(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    message = r"CUDAExecutionProvider is not in this ONNX Runtime; pip install 'hflow-rt\[gpu\]' or use --device cpu"
    with pytest.raises(BackendUnavailable, match=message):
        load(tiny_run, "onnx", "cuda")
    assert load(tiny_run, "onnx", "auto").backend == "onnxruntime CPUExecutionProvider"


@pytest.fixture
def silent_fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """An ONNX Runtime compiled with CUDA on a machine without: it opens the session on the CPU and says nothing."""
    real, asked = onnxruntime.InferenceSession, []

    def open_on_cpu(path: str, options: Any, providers: list[str]) -> Any:
        asked.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_cpu)
    return asked  # type: ignore[return-value]


def test_a_provider_that_does_not_start(tiny_run: Path, silent_fallback: list[list[str]]) -> None:
    session = load(tiny_run, "onnx", "cuda")
    with pytest.raises(
        BackendUnavailable, match=r"CUDAExecutionProvider does not start here.*'hflow-rt\[gpu\]' or use --device cpu"
    ):
        session.sample(1)
    assert silent_fallback == [[(CUDA, {"device_id": "0"} | CUDA_OPTIONS)]]


def test_processes_that_were_launched_together_take_a_gpu_each(
    tiny_run: Path, silent_fallback: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(BackendUnavailable):
        load(tiny_run, "onnx", "cuda").sample(1)
    assert silent_fallback == [[(CUDA, {"device_id": "3"} | CUDA_OPTIONS)]]


def test_auto_tries_cuda_and_says_what_runs(tiny_run: Path, silent_fallback: list[list[str]]) -> None:
    session = load(tiny_run, "onnx", "auto")
    assert session.backend == "onnxruntime CPUExecutionProvider"
    assert session.sample(1).shape == (1, 3, R, R)
    assert silent_fallback == [[(CUDA, {"device_id": "0"} | CUDA_OPTIONS)], [("CPUExecutionProvider", {})]]


def test_auto_takes_cuda_where_it_starts(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    opened = SimpleNamespace(get_providers=lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *arguments, **options: opened)
    assert load(tiny_run).backend == f"onnxruntime {CUDA}"


def test_tensors_are_read_and_written_where_they_are(
    tiny_run: Path, sessions: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, by binding their memory; any stride, any batch."""
    runs = []
    binding = onnxruntime.InferenceSession.run_with_iobinding
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run_with_iobinding", lambda *a, **k: runs.append(1) or binding(*a, **k)
    )
    session, images = load(tiny_run, "onnx", "cpu"), torch.rand(70, 3, R, R)
    monkeypatch.setattr(session._engine, "tensors", "cpu")
    expected = sessions["onnx"].inverse(images.numpy())
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        found = session.inverse(given)
        for name, values in expected.latents.items():
            np.testing.assert_allclose(found.latents[name].numpy(), values, atol=1e-5)
    assert len(runs) == 4  # 64 and 6, twice
    image = session.forward(found.latents)
    assert isinstance(image, torch.Tensor)
    np.testing.assert_allclose(image.numpy(), sessions["onnx"].forward(expected.latents), atol=1e-5)
    for harm, text in ((float("nan"), r"must lie in \[0, 1\]"), (1.1, r"must lie in \[0, 1\]")):
        wrong = images.clone()
        wrong[0, 0, 0, 0] = harm
        with pytest.raises(DataError, match=text):
            session.inverse(wrong)
    with pytest.raises(DataError, match="z0 holds NaN or infinite values"):
        session.forward(found.latents | {"z0": found.latents["z0"] / 0})


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_onnxruntime_on_a_gpu(tiny_run: Path, sessions: dict[str, Session], cuda_graph: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA: pip install 'hflow-rt[gpu]'")
    session, images = load(tiny_run, "onnx", "cuda", cuda_graph=cuda_graph), torch.rand(5, 3, R, R)
    expected = sessions["torch"].inverse(images)
    for device in ("cpu", "cuda:0", "cpu", "cuda:0"):
        found = session.inverse(images.to(device))
        for name, values in expected.latents.items():
            assert str(found.latents[name].device) == device
            np.testing.assert_allclose(found.latents[name].cpu().numpy(), values.numpy(), atol=1e-4)
        image = session.forward(found.latents)
        np.testing.assert_allclose(image.cpu().numpy(), images.numpy(), atol=1e-3)


def test_torch_without_cuda(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match=r"torch finds no CUDA device here; .* or use --device cpu"):
        load(tiny_run, "torch", "cuda")
    assert load(tiny_run, "torch").backend == "torch cpu"


@pytest.mark.parametrize(
    ("backend", "package", "extra"), [("onnx", "onnxruntime", "hflow-rt[cpu]"), ("torch", "torch", "hflow-rt[train]")]
)
def test_a_missing_package(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, backend: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable) as caught:
        load(tiny_run, backend)
    assert f"pip install '{extra}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_onnxruntime(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing one of its two packages takes files of the other along; what is left imports, and is empty."""
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    with pytest.raises(BackendUnavailable, match=r"onnxruntime is damaged.*hflow-rt doctor"):
        load(tiny_run)


def test_a_graph_that_onnxruntime_cannot_open(tiny_run: Path, tmp_path: Path) -> None:
    from hflow_rt.files import sha256

    bundle = find_bundle(shutil.copytree(tiny_run / "bundle", tmp_path / "b"))
    (bundle.path / "forward.onnx").write_bytes(b"not a graph")
    entry = bundle.manifest.files["forward.onnx"].model_copy(
        update={"bytes": 11, "sha256": sha256(bundle.path / "forward.onnx")}
    )
    bundle.manifest.files["forward.onnx"] = entry
    with pytest.raises(BundleError, match=r"ONNX Runtime [\d.]+ cannot open .*forward\.onnx: ") as caught:
        Session(bundle, OnnxEngine(bundle, "cpu", onnxruntime)).sample(1)
    assert "\n" not in str(caught.value)


# threads


@pytest.mark.parametrize("backend", ON_CPU)
def test_threads_get_what_one_gets(tiny_run: Path, sessions: dict[str, Session], backend: str) -> None:
    fresh = load(tiny_run, backend, "cpu")  # its graphs are opened by whichever thread comes first
    expected = [sessions[backend].sample(3, 0.7, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: fresh.sample(3, 0.7, seed), range(8)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
