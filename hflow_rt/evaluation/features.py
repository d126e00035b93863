"""Feature networks: from images to the vectors that distances between sets of images are measured in.

A network is one that is installed as a package, by name, or a file of the user's. Its name goes into the name of the
distance, for figures of two networks must never be compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.errors import BackendUnavailable, ConfigError, DataError
from hflow_rt.evaluation.efficientnet import SIDE, load_efficientnet, weights_file
from hflow_rt.extras import needed
from hflow_rt.files import is_file, sha256

__all__ = ["EFFICIENTNET", "INPUTS", "FeatureNetwork", "load_torchscript", "open_features"]

Pixels = NDArray[np.uint8]
Features = NDArray[np.float32]

EFFICIENTNET = "efficientnet-lite0"
# what a user's network takes: bytes, or float32 in [0, 1]
INPUTS = ("uint8", "float")
_TORCHSCRIPT = (".pt", ".pth", ".ts", ".jit")
_INCEPTION_FEATURES = 2048  # of its last pooling layer, which FID is defined on
# in an .onnx file, the key (field 1, 8 bytes) of the name of another file that holds a tensor
_ELSEWHERE = b"\x0a\x08location"


@dataclass(frozen=True)
class FeatureNetwork:
    """Images uint8 `[B, C, R, R]` to float32 `[B, dimensions]`; grey ones enter as three equal channels.

    frechet, kernel: what the two distances in these features are called. key: changes with anything that changes
    the features.
    """

    name: str
    frechet: str
    kernel: str
    sha256: str
    key: str
    dimensions: int
    run: Callable[[Pixels], Features]

    def __call__(self, pixels: Pixels) -> Features:
        """The features of a batch. Raises `DataError` where the network does not give one vector an image."""
        rgb = pixels if pixels.shape[1] == 3 else pixels.repeat(3, 1)
        return _vectors(self.run(rgb), len(pixels), self.name)


def open_features(
    features: str, resolution: int, device: torch.device | str = "cpu", takes: str | None = None
) -> FeatureNetwork:
    """`efficientnet-lite0`, or a file: .onnx, or TorchScript (.pt, .pth, .ts, .jit), whose code runs: trust it first.

    A file maps `[B, 3, R, R]` to `[B, D]`; `takes` says whether it wants uint8 (as most TorchScript Inception files
    do) or float32 in [0, 1]. An ONNX file says so itself. Distances are called FID only in the features of a file
    whose name starts with "inception" and that gives 2048 of them.

    Raises `ConfigError` for an unknown name or kind of file, `DataError` for a file that does not work, and
    `BackendUnavailable` for a missing package.
    """
    if takes is not None and takes not in INPUTS:
        raise ConfigError(f"a feature network takes {' or '.join(INPUTS)}, not '{takes}'")
    if features == EFFICIENTNET:
        if takes is not None:
            raise ConfigError(f"--feature-input is for files; {EFFICIENTNET} has its own; omit it")
        return _efficientnet(torch.device(device))
    path = Path(features)
    kind = path.suffix.lower()
    if kind not in (*_TORCHSCRIPT, ".onnx"):
        known = f"known: {EFFICIENTNET}, or a file that ends in {', '.join((*_TORCHSCRIPT, '.onnx'))}"
        raise ConfigError(f"unknown feature network '{features}'; {known}")
    if not is_file(path):
        raise DataError(f"no feature network at {path}; give a file, or the name {EFFICIENTNET}")
    if kind == ".onnx":
        run, takes = _onnx(path, resolution, torch.device(device), takes)
    else:
        takes = takes or "uint8"
        run = _torchscript(path, torch.device(device), takes)
    found = _vectors(run(np.zeros((2, 3, resolution, resolution), np.uint8)), 2, str(path))
    dimensions, digest = found.shape[1], sha256(path)
    if path.name.lower().startswith("inception") and dimensions == _INCEPTION_FEATURES:
        about = f"(user's Inception: {path.name}, sha256 {digest[:12]})"
        frechet, kernel = f"FID {about}", f"KID {about}"
    else:
        frechet, kernel = f"FD ({path.name})", f"KD ({path.name})"
    return FeatureNetwork(path.name, frechet, kernel, digest, f"{digest} {takes}", dimensions, run)


def _efficientnet(device: torch.device) -> FeatureNetwork:
    path = weights_file()
    network = load_efficientnet(path).to(device)

    @torch.inference_mode()
    def run(pixels: Pixels) -> Features:
        found: Features = network(torch.from_numpy(pixels).to(device).float()).cpu().numpy()
        return found

    digest = sha256(path)
    key = f"{digest} pooled, {SIDE} bilinear antialias"
    dimensions = network.classes.in_features
    return FeatureNetwork(EFFICIENTNET, "FD-EffLite0", "KD-EffLite0", digest, key, dimensions, run)


def load_torchscript(
    path: Path, device: torch.device, options: Mapping[str, Any]
) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """The module of a file, whose code runs, and those of the options that its `forward` has. Raises `DataError`."""
    if not is_file(path):
        raise DataError(f"no feature network at {path}; give a file, or the name {EFFICIENTNET}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which such files are made with
            module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{path} is not a TorchScript file ({str(error).split('.')[0]}); save one with torch.jit.save or give .onnx"
        ) from error
    forward = getattr(module, "forward", None)  # a file may have other methods only
    if forward is None:
        raise DataError(f"{path} has no method 'forward' that takes images; save the whole network as TorchScript")
    arguments = {argument.name for argument in forward.schema.arguments}
    return module, {name: value for name, value in options.items() if name in arguments}


def _torchscript(path: Path, device: torch.device, takes: str) -> Callable[[Pixels], Features]:
    # Inception files of the StyleGAN kind give class scores unless asked for features
    module, options = load_torchscript(path, device, {"return_features": True})

    @torch.inference_mode()
    def run(pixels: Pixels) -> Features:
        images = torch.from_numpy(pixels).to(device)
        try:
            found = module(images if takes == "uint8" else images.float() / 255, **options)
        except RuntimeError as error:
            other = INPUTS[1 - INPUTS.index(takes)]
            raise DataError(
                f"{path} fails on {takes} images {list(pixels.shape)}: {_last(error)}; does it want {other} "
                f"(--feature-input {other}) or another size?"
            ) from error
        if not isinstance(found, torch.Tensor):
            raise DataError(f"{path} must give one tensor of features, not a {type(found).__name__}")
        values: Features = found.float().cpu().numpy()
        return values

    return run


def _onnx(
    path: Path, resolution: int, device: torch.device, takes: str | None
) -> tuple[Callable[[Pixels], Features], str]:
    """The network and what it takes. Its file must be whole, because its hash stands for the network."""
    with needed("onnxruntime", "an .onnx feature network needs ONNX Runtime: pip install 'hflow-rt[cpu]'"):
        import onnxruntime as runtime
    if device.type == "cuda":
        provider: Any = ("CUDAExecutionProvider", {"device_id": device.index or 0})
    else:
        provider = "CPUExecutionProvider"
    if _ELSEWHERE in path.read_bytes():
        raise DataError(
            f"{path} keeps weights in another file, whose changes would go unnoticed; save it as one file: "
            "onnx.save(onnx.load(FILE), NEW)"
        )
    onnxruntime: Any = runtime  # it does not say what it exports
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # ours is the one line that explains a failure
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own, none public
        raise DataError(f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {_first(error)}") from error
    if device.type == "cuda" and session.get_providers()[0] != provider[0]:
        raise BackendUnavailable(
            f"{provider[0]} does not start here for {path}; pip install 'hflow-rt[gpu]' or use --device cpu"
        )
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        raise DataError(f"{path} must take one input, images; it takes {len(inputs)}")
    kinds = {"tensor(uint8)": "uint8", "tensor(float)": "float"}
    found = kinds.get(inputs[0].type)
    if found is None:
        raise DataError(f"{path} must take uint8 or float32 images, not {inputs[0].type}")
    if takes not in (None, found):
        raise ConfigError(f"{path} takes {found} images, as it says itself; omit --feature-input")
    name, shape = inputs[0].name, inputs[0].shape
    fixed = [given for given in zip(shape[1:], (3, resolution, resolution), strict=False) if isinstance(given[0], int)]
    if len(shape) != 4 or any(have != want for have, want in fixed):
        raise DataError(f"{path} must take images [B, 3, {resolution}, {resolution}], not {shape}; resize inside it")
    step = shape[0] if isinstance(shape[0], int) else None
    if step not in (None, 1):
        raise DataError(f"{path} must take batches of any size or of one image, not of {step}")

    def call(images: NDArray[Any]) -> Features:
        try:
            values: Features = np.asarray(session.run([outputs[0].name], {name: images})[0], np.float32)
        except Exception as error:
            raise DataError(f"{path} fails on {found} images {list(images.shape)}: {_first(error)}") from error
        return values

    def run(pixels: Pixels) -> Features:
        images: NDArray[Any] = pixels if found == "uint8" else pixels.astype(np.float32) / np.float32(255)
        if step is None:
            return call(images)
        return np.concatenate([call(images[i : i + 1]) for i in range(len(images))])

    return run, found


def _vectors(values: Features, count: int, name: str) -> Features:
    """Features of `count` images as `[count, D]`; `[count, D, 1, 1]` is that too."""
    if values.ndim < 2 or len(values) != count or values.shape[1] < 1 or values[0].size != values.shape[1]:
        raise DataError(f"{name} must give one vector an image, [{count}, D]; it gave {list(values.shape)}")
    return values.reshape(count, -1)


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _last(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("RuntimeError: ") if lines else type(error).__name__
