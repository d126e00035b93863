"""What sees how like two images are: features of float images, whose squared distance counts; differentiable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.evaluation.efficientnet import SIDE, load_efficientnet, weights_file
from hflow_rt.evaluation.features import EFFICIENTNET, load_torchscript

__all__ = ["Perception", "perception"]

Perception = Callable[[Tensor], list[Tensor]]

_SMALLEST, _ENLARGED = 64, 2  # side that a network sees: of small images not more than it needs, up to what it knows


def perception(features: str, resolution: int, device: torch.device, takes: str | None = None) -> Perception:
    """Maps or vectors `[B, ...]` of images `[B, C, R, R]`, nominally in [0, 1], R = `resolution`.

    features: the name of the network, or a TorchScript file, whose code runs, of images float32 `[B, 3, R, R]`, to
    features whose squared distance counts, as those of LPIPS are. Its images are in 0 .. 255, or in [0, 1] where
    `takes` is `float`. Raises `ConfigError`, `DataError` and `BackendUnavailable`.
    """
    if features == EFFICIENTNET:
        return _depths(resolution, device)
    if features.lower().endswith(".onnx"):
        raise ConfigError(f"what sees likeness is {EFFICIENTNET} or a TorchScript file such as LPIPS; found {features}")
    return _file(Path(features), device, 1.0 if takes == "float" else 255.0)


def _depths(resolution: int, device: torch.device) -> Perception:
    """Maps of EfficientNet before each halving: of every pixel a vector of length one, in sum over all of them one."""
    network = load_efficientnet(weights_file()).to(device).requires_grad_(False)
    side = min(max(_SMALLEST, _ENLARGED * resolution), SIDE)

    def run(images: Tensor) -> list[Tensor]:
        maps = network.depths(255 * _colours(images), side)
        return [F.normalize(x, dim=1, eps=1e-6) / (x.shape[2] * x.shape[3] * len(maps)) ** 0.5 for x in maps]

    return run


def _file(path: Path, device: torch.device, white: float) -> Perception:
    module, options = load_torchscript(path, device, {"resize_images": False, "return_lpips": True})

    def run(images: Tensor) -> list[Tensor]:
        try:
            found = module(white * _colours(images), **options)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise DataError(
                f"{path} fails on float images {list(images.shape)}: {last}; does it want others?"
            ) from error
        if not isinstance(found, Tensor) or len(found) != len(images):
            raise DataError(f"{path} must give one tensor of features, a row an image")
        return [found]

    return run


def _colours(images: Tensor) -> Tensor:
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)
