"""Bits per dimension of a model on images: the strict bound, and the published one beside it.

`evaluate` is what training calls now and then; `measure` tells which latent costs how many bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.draws import generator
from hflow_rt.errors import ConfigError, DataError
from hflow_rt.evaluation.session import Session
from hflow_rt.evaluation.shares import Alone, Shares, Track, batches, silent
from hflow_rt.models.checkpoint import load_model
from hflow_rt.models.family import LatentModel, NoiseScale

__all__ = [
    "BitsReport",
    "Bound",
    "Estimate",
    "Evaluation",
    "LatentBits",
    "evaluate",
    "measure",
    "open_reference",
    "paper_bits",
    "plug_in_bits",
    "strict_bits",
]

Pixels = NDArray[np.uint8]
Parts = dict[str, NDArray[np.float64]]  # of each image, by name

# which of the two bounds a stream belongs to
_STRICT, _PAPER = 0, 1


class Estimate(NamedTuple):
    """Mean over `n` images, and the standard error of that mean over images (NaN for a single one)."""

    mean: float
    standard_error: float
    n: int

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Estimate:
        """From the values of images `[n]`."""
        with np.errstate(invalid="ignore"):  # an infinite image makes the error NaN, which is what it is
            error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), float(error), len(values))

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        error = None if math.isnan(self.standard_error) else self.standard_error
        return {"mean": self.mean, "standard_error": error, "n": self.n}


@dataclass(frozen=True)
class Evaluation:
    """Bits per dimension after `images` training images.

    strict: None where there is none, and `reason` says why. paper: the family's published bound on the same
    images.
    """

    images: int
    strict: Estimate | None
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
            strict = Estimate(values["strict"], math.nan if error is None else error, values["held_out"])
        return cls(values["images"], strict, values["paper"], values["reason"])


@torch.no_grad()
def strict_bits(model: LatentModel, pixels: Pixels, seed: int = 0, draws: int = 1, batch: int = 32) -> Estimate:
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
    return Estimate.of(sums / draws)


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
            part, noise = _paper_draws(model, images[start : start + batch], draws, device)
            bits = model.loss(part, noise).bits_per_dim
            assert bits is not None  # in eval mode
            total += float(bits) * len(part)
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


@dataclass(frozen=True)
class LatentBits:
    """What one latent costs: its parts and their sum `total`, in bits per dimension of the image, so that the totals
    of all latents add up to the bound; and `own`, the same in bits per dimension of the latent."""

    name: str
    dimensions: int
    parts: dict[str, Estimate]
    total: Estimate
    own: Estimate

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        parts = {name: part.dump() for name, part in self.parts.items()}
        return {"dimensions": self.dimensions, "parts": parts, "total": self.total.dump(), "own": self.own.dump()}


@dataclass(frozen=True)
class Bound:
    """Bits per dimension and how they divide into latents, coarse to fine."""

    total: Estimate
    latents: tuple[LatentBits, ...]

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self.total.dump() | {"latents": {latent.name: latent.dump() for latent in self.latents}}


@dataclass(frozen=True)
class BitsReport:
    """Both bounds on the same images; one that cannot be computed is None, with the reason under its name.

    noise: the running scales of the posteriors, by latent.
    """

    strict: Bound | None
    paper: Bound | None
    reasons: dict[str, str]
    noise: dict[str, NoiseScale]

    @property
    def noise_unknown(self) -> bool:
        """Whether all spreads still have the value they start with, so that nobody ever estimated them."""
        return bool(self.noise) and all(scale.spread == 1 for scale in self.noise.values())

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        noise = {name: {**scale._asdict(), "std": scale.std} for name, scale in self.noise.items()}
        bounds = {name: None if bound is None else bound.dump() for name, bound in self._bounds().items()}
        return {**bounds, "reasons": self.reasons, "noise": noise, "noise_unknown": self.noise_unknown}

    def _bounds(self) -> dict[str, Bound | None]:
        return {"strict": self.strict, "paper": self.paper}


@torch.no_grad()
def measure(
    model: LatentModel,
    pixels: Pixels,
    seed: int = 0,
    draws: int = 1,
    batch: int = 32,
    shares: Shares | None = None,
    track: Track = silent,
) -> BitsReport:
    """Both bounds on uint8 images `[n, 3, R, R]`, latent by latent; the totals are those of `evaluate`.

    Deterministic in (seed, draws, batch), however many processes share the work. Raises `DataError` for no images.
    """
    images, device = _check(model, pixels), next(model.parameters()).device
    shares = shares or Alone()
    if draws < 1:
        raise DataError(f"the number of draws must be at least 1, not {draws}")

    def strict(part: range) -> Parts:
        pixels = images[part.start : part.stop].to(device)
        found = [_values(model.strict_terms(pixels, generator(seed, _STRICT, k, part.start))) for k in range(draws)]
        return {name: np.mean([values[name] for values in found], axis=0) for name in found[0]}

    def paper(part: range) -> Parts:
        draws = generator(seed, _PAPER, 0, part.start)
        return _values(model.paper_terms(*_paper_draws(model, images[part.start : part.stop], draws, device)))

    ways: dict[str, Callable[[range], Parts]] = {"strict": strict, "paper": paper}
    bounds: dict[str, Bound | None] = {}
    reasons: dict[str, str] = {}
    with _evaluating(model):
        for name, work in ways.items():
            bounds[name] = None
            try:
                mine = [work(part) for part in track(f"{name} bound", shares.share(batches(len(images), batch)))]
                refused = None
            except ConfigError as error:  # the settings have no such bound, which every process finds
                mine, refused = [], str(error)
            found = shares.collect(mine)
            if refused is not None or not found:
                reasons[name] = refused or "there are no images"
                continue
            values = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
            infinite = int((~np.isfinite(np.sum(list(values.values()), axis=0))).sum())
            if infinite:
                reasons[name] = f"it is not finite on {infinite} of {len(images)} images"
                continue
            bounds[name] = _bound(values, model.latent_shapes(), images[0].numel())
    return BitsReport(bounds["strict"], bounds["paper"], reasons, model.noise_scales())


def plug_in_bits(
    session: Session, pixels: Pixels, batch: int = 32, shares: Shares | None = None, track: Track = silent
) -> Estimate:
    """Bits per dimension that the `inverse` graph of any backend gives uint8 images `[n, 3, R, R]`: no bound.

    Every target is taken without the noise that its density needs (spec 3.2), and every pixel at the centre of its
    bin. Raises `DataError` for wrong images or where the value is not finite.
    """
    _check(session, pixels)
    shares = shares or Alone()
    bins = 1 << session.bits
    found = []
    for part in track("plug-in", shares.share(batches(len(pixels), batch))):
        levels = pixels[part.start : part.stop] // (256 // bins)
        images = levels.astype(np.float32) / np.float32(bins - 1)
        found.append(np.asarray(session.bits_per_dim(session.inverse(images).log_prob), np.float64))
    estimate = Estimate.of(np.concatenate(shares.collect(found)))
    if not math.isfinite(estimate.mean):
        raise DataError(f"the plug-in value is not finite on these {len(pixels)} images")
    return estimate


def open_reference(path: Path | str, device: torch.device | str = "cpu") -> LatentModel:
    """The reference model of a model file, in full precision on `device`. Raises `CheckpointError`."""
    if torch.device(device).type == "cuda":
        # TF32 keeps 10 bits of what the bound is computed from
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return load_model(path).to(device)


def _values(terms: Mapping[str, torch.Tensor]) -> Parts:
    return {name: values.double().cpu().numpy() for name, values in terms.items()}


def _bound(values: Parts, shapes: Mapping[str, tuple[int, ...]], image: int) -> Bound:
    """From the parts of every image, named `LATENT.WHAT`."""
    latents = []
    for name in dict.fromkeys(key.partition(".")[0] for key in values):
        parts = {key.partition(".")[2]: part for key, part in values.items() if key.partition(".")[0] == name}
        total = np.sum(list(parts.values()), axis=0)
        dimensions = math.prod(shapes.get(name, (image,)))
        estimates = {what: Estimate.of(part) for what, part in parts.items()}
        latents.append(
            LatentBits(name, dimensions, estimates, Estimate.of(total), Estimate.of(total * (image / dimensions)))
        )
    return Bound(Estimate.of(np.sum(list(values.values()), axis=0)), tuple(latents))


def _paper_draws(
    model: LatentModel, pixels: torch.Tensor, draws: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images and noise for `model.loss`."""
    part = model.dequantize(pixels, draws)
    shapes = model.noise_shapes()
    noise = {name: torch.randn(len(part), *shape, generator=draws).to(device) for name, shape in shapes.items()}
    return part.to(device), noise


def _check(model: LatentModel | Session, pixels: Pixels) -> torch.Tensor:
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
