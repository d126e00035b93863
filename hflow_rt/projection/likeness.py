"""How unlike images are to the eye: features of a network at several depths, and pixels; differentiable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.errors import DataError
from hflow_rt.evaluation.efficientnet import SIDE, load_efficientnet, weights_file
from hflow_rt.evaluation.features import EFFICIENTNET, load_torchscript

__all__ = ["unlikeness"]

# Without pixels colours drift, with them alone images blur. On emoji both parts begin at about the same size so.
_PIXELS = 10.0
_SMALLEST, _ENLARGED = 64, 2  # side that a network sees: of small images not more than it needs, up to what it knows


def unlikeness(features: str, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Distances `[B]` from targets `[B, C, R, R]` in [0, 1], of images of the same shape, which need not be within it.

    features: the name of the network, or a TorchScript file, whose code runs, of images float32 `[B, 3, R, R]` in 0 ..
    255 to features whose squared distance counts, as those of LPIPS are. Raises `DataError` and `BackendUnavailable`.
    """
    network = _depths(targets) if features == EFFICIENTNET else _file(Path(features), targets)
    with torch.no_grad():
        wanted = network(targets)

    def distance(images: Tensor) -> Tensor:
        parts = [(found - of).square().flatten(1).sum(1) for found, of in zip(network(images), wanted, strict=True)]
        pixels = (images - targets).square().flatten(1).mean(1)
        return torch.stack(parts).sum(0) + _PIXELS * pixels

    return distance


def _depths(targets: Tensor) -> Callable[[Tensor], list[Tensor]]:
    """Maps of EfficientNet before each halving: of every pixel a vector of length one, in sum over all of them one."""
    network = load_efficientnet(weights_file()).to(targets.device).requires_grad_(False)
    side = min(max(_SMALLEST, _ENLARGED * targets.shape[-1]), SIDE)

    def run(images: Tensor) -> list[Tensor]:
        maps = network.depths(255 * _colours(images), side)
        return [F.normalize(x, dim=1, eps=1e-6) / (x.shape[2] * x.shape[3] * len(maps)) ** 0.5 for x in maps]

    return run


def _file(path: Path, targets: Tensor) -> Callable[[Tensor], list[Tensor]]:
    module, options = load_torchscript(path, targets.device, {"resize_images": False, "return_lpips": True})

    def run(images: Tensor) -> list[Tensor]:
        try:
            found = module(255 * _colours(images), **options)
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
