"""Bits per dimension of a model on held-out images: the strict bound, and the published one beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.draws import generator
from hflow_rt.errors import ConfigError, DataError
from hflow_rt.models.family import LatentModel

__all__ = ["Evaluation", "StrictBits", "evaluate", "paper_bits", "strict_bits"]

Pixels = NDArray[np.uint8]

# which of the two bounds a stream belongs to
_STRICT, _PAPER = 0, 1


class StrictBits(NamedTuple):
    """Mean over `n` images, and the standard error of that mean over images (NaN for a single one)."""

    mean: float
    standard_error: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """Bits per dimension after `images` training images.

    strict: None where there is none, and `reason` says why. paper: the family's published bound on the same
    images.
    """

    images: int
    strict: StrictBits | None
    paper: float | None
    reason: str | None = None

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        strict = self.strict
        return {
            "images": self.images,
            "strict": None if strict is None else strict.mean,
            "standard_error": None if strict is None or math.isnan(strict.standard_error) else strict.standard_error,
            "held_out": 0 if strict is None else strict.n,
            "paper": self.paper,
            "reason": self.reason,
        }

    @classmethod
    def load(cls, values: dict[str, Any]) -> Evaluation:
        """From what `dump` yields."""
        strict = None
        if values["strict"] is not None:
            error = values["standard_error"]
            strict = StrictBits(values["strict"], math.nan if error is None else error, values["held_out"])
        return cls(values["images"], strict, values["paper"], values["reason"])


@torch.no_grad()
def strict_bits(model: LatentModel, pixels: Pixels, seed: int = 0, draws: int = 1, batch: int = 32) -> StrictBits:
    """A true upper bound on bits per dimension for uint8 images `[n, 3, R, R]`, over `draws` draws each.

    Deterministic in (seed, draws, batch). Raises `ConfigError` where the configuration has no such bound and
    `DataError` for no images.
    """
    images, device = _check(model, pixels), next(model.parameters()).device
    sums = np.zeros(len(images))
    with _evaluating(model):
        for start in range(0, len(images), batch):
            part = images[start : start + batch].to(device)
            for draw in range(draws):
                bits = model.strict_bits_per_dim(part, generator(seed, _STRICT, draw, start))
                sums[start : start + len(part)] += bits.double().cpu().numpy()
    means = sums / draws
    with np.errstate(invalid="ignore"):  # an infinite image makes the error NaN, which is what it is
        error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return StrictBits(float(means.mean()), float(error), len(means))


@torch.no_grad()
def paper_bits(model: LatentModel, pixels: Pixels, seed: int = 0, batch: int = 32) -> float:
    """The bound the family's authors published, with proper dequantisation and no added noise. Deterministic.

    Raises `DataError` for no images.
    """
    images, device = _check(model, pixels), next(model.parameters()).device
    total = 0.0
    with _evaluating(model):
        for start in range(0, len(images), batch):
            draws = generator(seed, _PAPER, 0, start)
            part = model.dequantize(images[start : start + batch], draws)
            shapes = model.noise_shapes()
            noise = {name: torch.randn(len(part), *shape, generator=draws).to(device) for name, shape in shapes.items()}
            total += float(model.loss(part.to(device), noise).bits_per_dim) * len(part)
    return total / len(images)


def evaluate(
    model: LatentModel, pixels: Pixels, images: int, seed: int = 0, draws: int = 1, batch: int = 32
) -> Evaluation:
    """Both bounds on uint8 images `[n, 3, R, R]`; what cannot be computed is None, with the reason."""
    if len(pixels) == 0:
        return Evaluation(images, None, None, "there are no held-out images")
    paper = paper_bits(model, pixels, seed, batch)
    strict, reason = None, None
    try:
        strict = strict_bits(model, pixels, seed, draws, batch)
        if not math.isfinite(strict.mean):
            strict, reason = None, f"the strict bound is not finite on these {len(pixels)} images"
    except ConfigError as error:
        reason = str(error)
    return Evaluation(images, strict, paper if math.isfinite(paper) else None, reason)


def _check(model: LatentModel, pixels: Pixels) -> torch.Tensor:
    expected = (3, model.resolution, model.resolution)
    if len(pixels) == 0 or pixels.shape[1:] != expected or pixels.dtype != np.uint8:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise DataError(f"evaluation needs uint8 images [n, {', '.join(map(str, expected))}], n >= 1; found {found}")
    return torch.from_numpy(np.ascontiguousarray(pixels))


@contextmanager
def _evaluating(model: LatentModel) -> Iterator[None]:
    """Eval mode inside, the former mode after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
