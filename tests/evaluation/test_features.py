"""Feature networks: files of the user's, and the one that ships as a package."""

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from tiny_networks import Asked, Means, expected
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.errors import BackendUnavailable, CheckpointError, ConfigError, DataError
from hflow_rt.evaluation import efficientnet
from hflow_rt.evaluation.efficientnet import EfficientNetLite0, load_efficientnet, weights_file
from hflow_rt.evaluation.features import EFFICIENTNET, open_features
from hflow_rt.files import sha256

R = 8
PIXELS = np.random.default_rng(1).integers(0, 256, (5, 3, R, R), dtype=np.uint8)
Save = Callable[..., Path]


# files


@pytest.mark.parametrize("takes", [None, "uint8", "float"])
def test_torchscript_gives_its_features_from_bytes_or_floats(scripted: Save, takes: str | None) -> None:
    path = scripted(Means())
    network = open_features(str(path), R, takes=takes)
    np.testing.assert_allclose(network(PIXELS), expected(PIXELS), rtol=1e-5)
    assert (network.dimensions, network.frechet, network.kernel) == (4, "FD (means.pt)", "KD (means.pt)")
    assert network.sha256 == sha256(path)


def test_grey_images_enter_as_three_equal_channels(scripted: Save) -> None:
    grey = PIXELS[:, :1]
    network = open_features(str(scripted(Means())), R)
    np.testing.assert_allclose(network(grey), expected(grey.repeat(3, 1)), rtol=1e-5)


def test_what_a_file_takes_is_part_of_its_key(scripted: Save) -> None:
    path = str(scripted(Means()))
    keys = {open_features(path, R, takes=takes).key for takes in ("uint8", "float")}
    assert len(keys) == 2
    assert open_features(path, R).key in keys


def test_a_network_that_must_be_asked_is_asked_for_features(scripted: Save) -> None:
    np.testing.assert_allclose(open_features(str(scripted(Asked())), R)(PIXELS), expected(PIXELS), rtol=1e-5)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8])
@pytest.mark.parametrize("shape", [("n", 3, "h", "w"), (1, 3, R, R), ("n", 3, R, R)])
def test_onnx_gives_its_features(onnx_network: Save, kind: int, shape: tuple[Any, ...]) -> None:
    network = open_features(str(onnx_network(kind=kind, shape=shape)), R)
    np.testing.assert_allclose(network(PIXELS), expected(PIXELS), rtol=1e-5)
    assert network.frechet == "FD (means.onnx)"


class Wide(torch.nn.Module):
    """As many features as Inception's last pooling layer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.ones(3, features))

    def forward(self, images: Tensor) -> Tensor:
        return (images.float().mean((2, 3)) @ self.weights)[:, :, None, None]  # [B, D, 1, 1] is a vector too


@pytest.mark.parametrize(
    ("name", "features", "called"),
    [
        ("inception-2015-12-05.pt", 2048, True),
        ("Inception_v3.pt", 2048, True),
        ("inception-2015-12-05.pt", 2047, False),
        ("my-inception.pt", 2048, False),
    ],
)
def test_only_inception_features_are_called_fid(scripted: Save, name: str, features: int, called: bool) -> None:
    path = scripted(Wide(features), name)
    network = open_features(str(path), R)
    if called:
        assert network.frechet == f"FID (user's Inception: {name}, sha256 {sha256(path)[:12]})"
        assert network.kernel.startswith("KID (")
    else:
        assert (network.frechet, network.kernel) == (f"FD ({name})", f"KD ({name})")


# bad files, one line each


class Half(torch.nn.Module):
    """One vector for two images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))[::2]


class Pair(torch.nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


class Features(torch.nn.Module):
    """No `forward`."""

    @torch.jit.export
    def features(self, images: Tensor) -> Tensor:
        return images


class FloatsOnly(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda s, o, t: "inception",
            ConfigError,
            "unknown feature network 'inception'; known: efficientnet-lite0, or a",
        ),
        (lambda s, o, t: str(t / "no.pt"), DataError, "no feature network at .*no.pt; give a file, or the name effi"),
        (lambda s, o, t: _written(t / "a.pt", b"no"), DataError, "a.pt is not a TorchScript file"),
        (lambda s, o, t: _saved(t / "state.pt"), DataError, "state.pt is not a TorchScript file"),
        (lambda s, o, t: _written(t / "a.onnx", b"no"), DataError, "ONNX Runtime .* cannot open .*a.onnx"),
        (lambda s, o, t: s(Half()), DataError, r"must give one vector an image, \[2, D\]; it gave \[1, 3\]"),
        (lambda s, o, t: s(Pair()), DataError, "must give one tensor of features, not a tuple"),
        (lambda s, o, t: s(Features()), DataError, "means.pt has no method 'forward' that takes images; save"),
        (lambda s, o, t: _split(o()), DataError, "split.onnx keeps weights in another file.*; save it as one file"),
        (lambda s, o, t: s(FloatsOnly()), DataError, r"fails on uint8 images \[2, 3, 8, 8\]: .*--feature-input float"),
        (lambda s, o, t: o(keep=False), DataError, r"must give one vector an image, \[2, D\]; it gave \[2, 3, 8, 8\]"),
        (lambda s, o, t: o(kind=TensorProto.DOUBLE), DataError, r"must take uint8 or float32 images, not tensor\(doub"),
        (lambda s, o, t: o(shape=("n", 3, 9, 9)), DataError, r"must take images \[B, 3, 8, 8\].*; resize inside it"),
        (lambda s, o, t: o(shape=(4, 3, R, R)), DataError, "must take batches of any size or of one image, not of 4"),
    ],
)
def test_bad_files(
    scripted: Save, onnx_network: Save, tmp_path: Path, make: Any, error: type[Exception], message: str
) -> None:
    path = str(make(scripted, onnx_network, tmp_path))
    with pytest.raises(error, match=message) as raised:
        open_features(path, R)
    assert "\n" not in str(raised.value)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _split(path: Path) -> Path:
    """The weights in a file beside it."""
    model, split = onnx.load(path), path.with_name("split.onnx")
    onnx.save(model, split, save_as_external_data=True, location="split.data", size_threshold=0)
    assert path.with_name("split.data").is_file()
    return split


def test_a_network_in_two_files_can_be_joined_as_the_error_says(onnx_network: Save, tmp_path: Path) -> None:
    split, whole = _split(onnx_network()), tmp_path / "whole.onnx"
    onnx.save(onnx.load(split), whole)
    np.testing.assert_allclose(open_features(str(whole), R)(PIXELS), expected(PIXELS), rtol=1e-5)


def _saved(path: Path) -> Path:
    torch.save({"weight": torch.zeros(2)}, path)
    return path


def test_the_input_must_be_known_and_fit(onnx_network: Save) -> None:
    with pytest.raises(ConfigError, match="takes uint8 or float, not 'bytes'"):
        open_features("a.pt", R, takes="bytes")
    with pytest.raises(ConfigError, match="takes float images, as it says itself"):
        open_features(str(onnx_network()), R, takes="uint8")
    with pytest.raises(ConfigError, match="--feature-input is for files"):
        open_features(EFFICIENTNET, R, takes="float")


# the network that ships as a package


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(weights_file(), map_location="cpu", weights_only=True)
    return found


@pytest.fixture(scope="module")
def lite() -> EfficientNetLite0:
    return load_efficientnet(weights_file()).double()


def pattern() -> Tensor:
    """A fixed image `[1, 3, 64, 64]` with edges everywhere."""
    i = np.arange(64)
    planes = [(3 * i[:, None] + 5 * (channel + 1) * i + 40 * channel) % 256 for channel in range(3)]
    return torch.from_numpy(np.stack(planes)[None]).double()


@torch.no_grad()
def test_its_features_are_those_of_another_implementation(lite: EfficientNetLite0) -> None:
    """The figures were made in float64 by `efficientnet-lite-pytorch` 0.1.0, from which the weights come."""
    features, scores = lite(pattern())[0], lite.classify(pattern())[0]
    assert features.shape == (1280,)
    largest = [5.23559711840008, 4.89515797283631, 4.678100915749646, 4.4404869619505565, 4.177746486656749]
    assert features.topk(5).values.tolist() == pytest.approx(largest, rel=1e-12)
    assert features.topk(5).indices.tolist() == [113, 897, 61, 1056, 244]
    assert float(features.sum()) == pytest.approx(231.74740396035614, rel=1e-12)
    assert int((features > 0).sum()) == 415
    assert (int(scores.argmax()), float(scores.max())) == (885, pytest.approx(8.318088417545159, rel=1e-12))


@torch.no_grad()
def test_folding_its_norms_changes_nothing(lite: EfficientNetLite0, weights: dict[str, Tensor]) -> None:
    """A second evaluation straight from the file, norms folded into convolutions, uses every number in it."""
    used: set[str] = set()

    def take(name: str) -> Tensor:
        used.add(name)
        return weights[name].double()

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        gain = take(f"{norm}.weight") / (take(f"{norm}.running_var") + 1e-3).sqrt()
        kernel = take(f"{conv}.weight") * gain[:, None, None, None]
        shift = take(f"{norm}.bias") - take(f"{norm}.running_mean") * gain
        used.add(f"{norm}.num_batches_tracked")
        missing = kernel.shape[-1] - stride  # every side here is a multiple of the stride
        before, after = missing // 2, missing - missing // 2
        groups = x.shape[1] // kernel.shape[1]
        return F.conv2d(F.pad(x, (before, after) * 2), kernel, shift, stride, groups=groups)

    x = F.interpolate(pattern(), size=(224, 224), mode="bilinear", antialias=True)
    x = layer((x - 127) / 128, "_conv_stem", "_bn0", 2).clamp(0, 6)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for index, stride in enumerate(strides):
        block = f"_blocks.{index}"
        h = x if index == 0 else layer(x, f"{block}._expand_conv", f"{block}._bn0").clamp(0, 6)
        h = layer(h, f"{block}._depthwise_conv", f"{block}._bn1", stride).clamp(0, 6)
        h = layer(h, f"{block}._project_conv", f"{block}._bn2")
        x = x + h if x.shape == h.shape else h
    x = layer(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))
    torch.testing.assert_close(lite(pattern()), x, rtol=1e-10, atol=1e-10)
    scores = x @ take("_fc.weight").T + take("_fc.bias")
    torch.testing.assert_close(lite.classify(pattern()), scores, rtol=1e-10, atol=1e-10)
    assert used == weights.keys()
    assert sum(parameter.numel() for parameter in lite.parameters()) == 4_652_008


def test_it_is_named_for_what_it_is() -> None:
    network = open_features(EFFICIENTNET, 64)
    assert (network.frechet, network.kernel, network.dimensions) == ("FD-EffLite0", "KD-EffLite0", 1280)
    pixels = pattern().numpy().astype(np.uint8)
    found = network(pixels)
    assert (found.dtype, found.shape) == (np.float32, (1, 1280))
    assert float(found.sum()) == pytest.approx(231.747, rel=1e-4)


def test_the_network_reads_no_code_and_only_whole_weights(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit",))

    torch.save({"_fc.bias": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match=r"hostile\.pth cannot be read as weights"):
        load_efficientnet(tmp_path / "hostile.pth")
    (tmp_path / "cut.pth").write_bytes(weights_file().read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be read as weights"):
        load_efficientnet(tmp_path / "cut.pth")
    torch.save({name: value for name, value in weights.items() if name != "_bn0.bias"}, tmp_path / "less.pth")
    with pytest.raises(
        CheckpointError, match=re.escape("less.pth does not fit the model: missing stem.norm.bias [32]")
    ):
        load_efficientnet(tmp_path / "less.pth")
    broken = weights | {"_fc.bias": torch.full((1000,), math.nan)}
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=re.escape("classes.bias holds NaN")):
        load_efficientnet(tmp_path / "nan.pth")


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    assert importlib.util.find_spec("numpy") is None  # the same function
    with pytest.raises(BackendUnavailable, match=re.escape("pip install 'hflow-rt[eval]'")):
        open_features(EFFICIENTNET, R)
