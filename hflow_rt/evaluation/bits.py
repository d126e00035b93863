"""Bits per dimension of a model on images, by every bound that it has.

`bits_per_dim` tells which latent costs how many bits; `bits_figures` is what training asks of it now and then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hflow_rt.data.selection import Selection
from hflow_rt.errors import BundleError, ConfigError, DataError
from hflow_rt.evaluation.batches import Alone, Shares, Track, batches, silent
from hflow_rt.evaluation.figures import BITS, Estimate, Evaluation, Figure
from hflow_rt.evaluation.session import Session
from hflow_rt.limits import check_count, check_seed
from hflow_rt.models.checkpoint import load_model
from hflow_rt.models.family import Bound, LatentModel, NoiseScale, conditions_by_folder
from hflow_rt.streams import generator

__all__ = [
    "BitsReport",
    "BoundBits",
    "LatentBits",
    "bits_figures",
    "bits_per_dim",
    "open_reference",
    "pixels_of",
]

Pixels = NDArray[np.uint8]
Parts = dict[str, NDArray[np.float64]]  # of each image, by name; what has more than one axis is no part of a bound

NO_LIKELIHOOD = "models of this family have no likelihood"


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
class BoundBits:
    """Bits per dimension and how they divide into latents, coarse to fine. quoted: `total` in the bound's own unit."""

    total: Estimate
    latents: tuple[LatentBits, ...]
    quoted: Figure

    def dump(self) -> dict[str, Any]:
        """As plain JSON values, in bits per dimension, beside the figure in another unit."""
        other = {} if self.quoted.unit == BITS else {self.quoted.unit: self.quoted.estimate.dump()}
        return self.total.dump() | other | {"latents": {latent.name: latent.dump() for latent in self.latents}}


@dataclass(frozen=True)
class BitsReport:
    """Every bound on the same images.

    claims: the model's bounds, the one to quote first. bounds: those that could be computed. reasons: why others could
    not, by name. noise: the running scales of the posteriors, by latent. figures: what else a bound tells.
    """

    claims: dict[str, Bound]
    bounds: dict[str, BoundBits]
    reasons: dict[str, str]
    noise: dict[str, NoiseScale]
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def noise_unknown(self) -> bool:
        """Whether all spreads still have the value they start with, so that nobody ever estimated them."""
        return bool(self.noise) and all(scale.spread == 1 for scale in self.noise.values())

    def dump(self) -> dict[str, Any]:
        """As plain JSON values: a bound by its name, or None."""
        noise = {name: {**scale._asdict(), "std": scale.std} for name, scale in self.noise.items()}
        bounds = {name: self.bounds[name].dump() if name in self.bounds else None for name in self.claims}
        figures = {name: {"title": one.title, **one.estimate.dump()} for name, one in self.figures.items()}
        about = {"reasons": self.reasons, "noise": noise, "noise_unknown": self.noise_unknown}
        return {**bounds, **about, "figures": figures}


@torch.no_grad()
def bits_per_dim(
    model: LatentModel,
    images: Pixels | Selection,
    seed: int = 0,
    draws: int = 1,
    batch: int = 32,
    shares: Shares | None = None,
    track: Track = silent,
    session: Session | None = None,
    names: Sequence[str] | None = None,
) -> BitsReport:
    """Every bound on uint8 images `[n, C, R, R]`, latent by latent; of a selection one batch at a time is in memory.

    draws: of an image, for each bound but a published one, which takes one.
    names: of the images in their set, whose folders tell a model of classes theirs; a selection knows its own.
    session: computes them instead of `model`, by the graph `bound` of its bundle; `model`, which is the reference
    of that bundle, then only makes the draws, so that the two differ by rounding alone. What is drawn for an image
    depends on the seed and its place among the images alone, however they are batched and shared among processes.
    Raises `DataError` for no images, `ConfigError` for a family without likelihood and `BundleError` for a bundle
    without that graph.
    """
    if not model.bounds():
        raise ConfigError(f"{NO_LIKELIHOOD}; use 'hflow-rt eval distance'")
    _check(model, images)
    device = next(model.parameters()).device
    shares = shares or Alone()
    check_count("the number of draws", draws)
    check_seed(seed)
    if session is not None and "bound" not in session.manifest.graphs:
        raise BundleError(
            "this bundle has no 'bound' engine; export it with 'hflow-rt export RUN --bound', or use --backend torch"
        )

    if model.conditions() and names is None:
        names = images.names if isinstance(images, Selection) else []
    if model.conditions() and len(names or ()) != len(images):
        raise DataError("a model of classes is measured on images in folders named after them; found none")

    def features(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        moved = ready(inputs)
        if session is None:
            return dict(model.bound_features(moved))
        return session.run_graph("features", moved) if "features" in session.manifest.graphs else {}

    def terms(inputs: dict[str, torch.Tensor], once: dict[str, Any]) -> Parts:
        if session is None:
            found = model.bound_terms(ready(inputs) | once)
            return {name: values.cpu().double().numpy() for name, values in found.items()}  # some GPUs lack float64
        bound = session.run_graph("bound", ready(inputs) | once)
        return {name: values.astype(np.float64) for name, values in bound.items()}

    def ready(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {name: value.to(device) if session is None else value.numpy() for name, value in inputs.items()}

    def drawn(bound: str, draw: int, part: range) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_of(images, part)))
        conditions = conditions_by_folder(model, [names[index] for index in part]) if names else {}
        rows = []
        for i, index in enumerate(part):
            stream = generator(seed, streams.index(bound), draw, index)
            one = {name: value[i : i + 1] for name, value in conditions.items()}
            rows.append(model.bound_inputs(bound, pixels[i : i + 1], stream, one))
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def work(bound: str, part: range) -> Parts:
        claim, first = claims[bound], drawn(bound, 0, part)
        once, found = features(first), []
        for draw in range(1 if claim.claim == "published" else draws):
            found.append(terms(drawn(bound, draw, part) if draw else first, once))
        return _combined(found, claim, dimensions)

    claims, dimensions = model.bounds(), model.channels * model.resolution**2
    streams = list(claims)
    bounds: dict[str, BoundBits] = {}
    reasons: dict[str, str] = {}
    figures: dict[str, Figure] = {}
    with _evaluating(model):
        for name, claim in claims.items():
            try:
                mine = [work(name, part) for part in track(claim.title, shares.share(batches(len(images), batch)))]
                refused = None
            except ConfigError as error:  # the settings have no such bound, which every process finds
                mine, refused = [], str(error)
            found = shares.collect(mine)
            if refused is not None or not found:
                reasons[name] = refused or "there are no images"
                continue
            values = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
            rows = {key: values.pop(key).mean(0) for key in list(values) if values[key].ndim > 1}
            infinite = int((~np.isfinite(list(values.values())).all(axis=0)).sum())
            if infinite:
                reasons[name] = f"it is not finite on {infinite} of {len(images)} images"
                continue
            bounds[name] = _bound(values, model.latent_shapes(), dimensions, claims[name])
            if rows and not figures:
                figures = model.bound_figures(rows)
    return BitsReport(claims, bounds, reasons, model.noise_scales(), figures)


def bits_figures(
    model: LatentModel,
    pixels: Pixels,
    images: int,
    seed: int = 0,
    draws: int = 1,
    batch: int = 32,
    names: Sequence[str] | None = None,
) -> Evaluation:
    """The totals of `bits_per_dim` by name; what cannot be computed has a reason. Raises `DataError` as it does."""
    if not model.bounds():
        return Evaluation(images, reason=NO_LIKELIHOOD)
    if len(pixels) == 0:
        return Evaluation(images, reason="there are no held-out images")
    found = bits_per_dim(model, pixels, seed, draws, batch, names=names)
    figures = {name: bound.quoted for name, bound in found.bounds.items()}
    return Evaluation(images, figures | found.figures, found.reasons)


def open_reference(path: Path | str, device: torch.device | str = "cpu") -> LatentModel:
    """The reference model of a model file, in full precision on `device`. Raises `CheckpointError`."""
    if torch.device(device).type == "cuda":
        # TF32 keeps 10 bits of what the bound is computed from
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return load_model(path).to(device)


def _combined(draws: list[Parts], bound: Bound, image: int) -> Parts:
    """Draws of the same images as one: the mean of each part.

    Where likelihoods are averaged instead of bits, the bound is lower than the sum of these by `image.weighting`.
    """
    means = {name: np.mean([parts[name] for parts in draws], axis=0) for name in draws[0]}
    if bound.combine == "mean":
        return means
    nats = image * math.log(2)
    log_weights = [-nats * np.sum(_parts(one), axis=0) for one in draws]
    total = (math.log(len(draws)) - np.logaddexp.reduce(log_weights)) / nats
    return means | {"image.weighting": total - np.sum(_parts(means), axis=0)}


def _parts(values: Parts) -> list[NDArray[np.float64]]:
    """Those that sum to a bound, of what an image yields."""
    return [part for part in values.values() if part.ndim == 1]


def _bound(values: Parts, shapes: Mapping[str, tuple[int, ...]], image: int, claim: Bound) -> BoundBits:
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
    total = np.sum(list(values.values()), axis=0)
    quoted = total if claim.unit == BITS else total * (image * math.log(2))
    return BoundBits(Estimate.of(total), tuple(latents), Figure(claim.title, Estimate.of(quoted), claim.unit))


def pixels_of(images: Pixels | Selection, part: range) -> Pixels:
    """The images `part`, `[n, C, R, R]`."""
    return images.pixels(part) if isinstance(images, Selection) else images[part.start : part.stop]


def _check(model: LatentModel, images: Pixels | Selection) -> None:
    """Of the first image, which all others are like."""
    expected, first = (
        (model.channels, model.resolution, model.resolution),
        pixels_of(images, range(min(len(images), 1))),
    )
    if len(images) == 0 or first.shape[1:] != expected or first.dtype != np.uint8:
        found = f"{first.dtype} {[len(images), *first.shape[1:]]}"
        raise DataError(f"evaluation needs uint8 images [n, {', '.join(map(str, expected))}], n >= 1; found {found}")


@contextmanager
def _evaluating(model: LatentModel) -> Iterator[None]:
    """Eval mode inside, the former mode after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
