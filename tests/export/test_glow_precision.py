"""Glow in half precision: of the subnets' arithmetic (mixed), and of all weights (half)."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from hflow_rt.export.bundle import export_bundle
from hflow_rt.export.judging import MIXED
from hflow_rt.manifest import Manifest
from hflow_rt.models.checkpoint import load_model, save_model
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.network import Glow
from hflow_rt.runtime.session import load

STEPS = 2 * 1  # levels times steps
Model = tuple[Path, Manifest]


def photographs(count: int, seed: int) -> np.ndarray:
    """Smooth images in [0, 1]."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, 16)
    start, right, down = (rng.uniform(0.1, 0.9, (count, 3, 1, 1)) for _ in range(3))
    mixed = start + (right - start) * ramp + (down - start) * ramp[:, None]
    return np.clip(mixed, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An affine model of the paper's form with nothing left at zero."""
    torch.manual_seed(0)
    model = Glow(GlowConfig(resolution=16, levels=2, steps=STEPS // 2, hidden_channels=48))
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.init_from_batch(torch.from_numpy(photographs(32, 1)) - 0.5 + 0.02 * torch.randn(32, 3, 16, 16))
    path = tmp_path_factory.mktemp("glow") / "model.safetensors"
    save_model(path, "glow", model, model.state_dict(), {})
    return path


@pytest.fixture(scope="module")
def plain(source: Path) -> Model:
    return source.parent / "plain", export_bundle(source, source.parent / "plain", photographs(4, 2))


@pytest.fixture(scope="module")
def mixed(source: Path) -> Model:
    return source.parent / "mixed", export_bundle(source, source.parent / "mixed", photographs(4, 2), precision="mixed")


@pytest.fixture(scope="module")
def half(source: Path) -> Model:
    return source.parent / "half", export_bundle(source, source.parent / "half", photographs(4, 2), half=True)


@pytest.mark.parametrize("name", ["forward", "inverse"])
def test_the_hidden_convolutions_and_nothing_else(mixed: Model, name: str) -> None:
    path, manifest = mixed
    assert manifest.verified, manifest.parity
    proto = onnx.load(path / f"{name}.onnx")
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    halves = Counter(node.op_type for node in proto.graph.node if kinds.get(node.output[0]) == TensorProto.FLOAT16)
    # two of the three convolutions of a subnet with their activations; the ones of the edges
    assert halves.pop("Cast") == STEPS
    assert halves.pop("Conv") == 2 * STEPS
    assert halves.pop("Relu") == 2 * STEPS
    assert set(halves) <= {"Pad", "Concat"}
    for tensor in (*proto.graph.input, *proto.graph.output):
        assert tensor.type.tensor_type.elem_type == TensorProto.FLOAT


def test_what_it_costs(plain: Model, mixed: Model) -> None:
    exact, session = load(plain[0], device="cpu"), load(mixed[0], device="cpu")
    error = np.abs(session.sample(16, 0.7) - exact.sample(16, 0.7))
    assert 1e-6 < error.max() < 0.01  # float16 did compute
    x = photographs(6, 5)
    found, expected = session.inverse(x), exact.inverse(x)
    bits = np.abs(session.bits_per_dim(found.log_prob) - exact.bits_per_dim(expected.log_prob))
    assert 0 < bits.max() < MIXED["bits_per_dim"]
    # both directions read one state and so round alike: the round trip is that of float32
    assert np.abs(session.forward(found.latents) - x).max() < 2e-5


def test_rounded_weights_take_half_the_room(source: Path, plain: Model, half: Model) -> None:
    """Every convolution of subnets and priors is kept rounded; only mixing and border maps are not."""
    path, manifest = half
    assert manifest.verified, manifest.parity
    proto = onnx.load(path / "forward.onnx", load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert Counter(kinds.values())[TensorProto.FLOAT16] == 3 * STEPS + 1
    sizes = {name: manifest.files[name].bytes for name in ("model.safetensors", "weights.bin")}
    assert sizes["model.safetensors"] < 0.6 * plain[1].files["model.safetensors"].bytes
    assert sizes["weights.bin"] < 0.75 * plain[1].files["weights.bin"].bytes
    state, rounded = load_model(source).state_dict(), load_model(path / "model.safetensors").state_dict()
    for name, value in state.items():
        assert torch.equal(rounded[name], value.half().float() if value.is_floating_point() else value)


def test_the_rounded_model_is_near_the_model(plain: Model, half: Model) -> None:
    exact, session = load(plain[0], device="cpu"), load(half[0], device="cpu")
    x = photographs(6, 6)
    found, expected = session.inverse(x), exact.inverse(x)
    bits = session.bits_per_dim(found.log_prob) - exact.bits_per_dim(expected.log_prob)
    assert 0 < np.abs(bits).max() < 0.02
    assert np.abs(session.forward(found.latents) - x).max() < 2e-5
