"""Images as values of a space of a model, found by search: any space that leads to images, of any family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hflow_rt.conditions import in_turn
from hflow_rt.errors import ConfigError, DataError
from hflow_rt.evaluation.features import EFFICIENTNET
from hflow_rt.limits import check_count
from hflow_rt.models.family import GraphSpec, LatentModel
from hflow_rt.projection.likeness import unlikeness
from hflow_rt.projection.search import centre_of, projected
from hflow_rt.streams import generator

__all__ = ["OWN_SPACE", "Step", "project", "space_to_search"]

Array = NDArray[np.float32]

OWN_SPACE = "z"  # of the latents themselves
_DRAWS, _DRAWS_AT_ONCE = 10_000, 500  # values whose middle the search starts from


@dataclass(frozen=True)
class Step:
    """Where a search stands: the values by name, `[B, *shape]`, and how unlike the images were before it, `[B]`."""

    values: dict[str, Array]
    distances: NDArray[np.float64]


def space_to_search(model: LatentModel, space: str | None) -> str:
    """The space that was named, or the first that leads to images, else the latents' own. Raises `ConfigError`."""
    known = [name for name, found in model.spaces().items() if found.into and found.decode]
    known += [OWN_SPACE] if isinstance(model.routes().get("forward"), str) and not model.bank() else []
    if not known:
        raise ConfigError("no space of this model can be searched: an image takes many calls of its network")
    if space is not None and space not in known:
        raise ConfigError(f"'{space}' cannot be searched; this model has {', '.join(known)}")
    return known[0] if space is None else space


def project(
    model: LatentModel,
    images: Array,
    *,
    space: str | None = None,
    steps: int = 1000,
    per_slot: bool = False,
    features: str = EFFICIENTNET,
    conditions: Mapping[str, Array] | None = None,
    controls: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Iterator[Step]:
    """Search for all images `[B, C, R, R]` in [0, 1] together, on the model's device; by step how that goes.

    space: see `space_to_search`. per_slot: of a space of several layers each has values of its own, which comes nearer
    to an image and further from what the model draws. features: see `unlikeness`. conditions, controls: as of
    `Session.forward`. Raises `ConfigError`, `DataError` and `BackendUnavailable` before the first step.
    """
    check_count("the number of steps", steps)
    wanted = (model.channels, model.resolution, model.resolution)
    if images.shape[1:] != wanted or images.dtype != np.float32:
        raise DataError(f"images must be float32 [B, {', '.join(map(str, wanted))}]; found {list(images.shape)}")
    space = space_to_search(model, space)
    found = model.spaces().get(space)
    if per_slot and (found is None or not found.slots):
        raise ConfigError(f"space {space} of this model has no slots; omit --per-slot")
    device = next(model.parameters()).device
    specs = model.graphs()
    forward = model.routes()["forward"]
    spec = specs[str(found.decode if found is not None else forward)]
    decode = model.unclamped(spec.name).to(device).requires_grad_(False)
    distance = unlikeness(features, torch.from_numpy(images).to(device))
    names = [tensor.name for tensor in spec.inputs if tensor.role in ("latent", "value")]
    told = in_turn(model.conditions(), range(len(images))) if conditions is None else conditions
    given = {name: torch.from_numpy(rows).to(device) for name, rows in told.items()}
    for tensor in spec.inputs:
        if tensor.role == "control":
            number = (controls or {}).get(tensor.name, tensor.default or 0.0)
            given[tensor.name] = torch.full((len(images), *tensor.shape), number, device=device)
        elif tensor.role in ("noise", "uniform") and tensor.default is None:
            middle = 0.0 if tensor.role == "noise" else 0.5
            given[tensor.name] = torch.full((len(images), *tensor.shape), middle, device=device)
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs if tensor.name in names}
    slots = found is not None and found.slots
    centre, spread = _middle(model, None if found is None else specs[str(found.into)], shapes, slots, seed, device)
    start = centre.expand(len(images), *centre.shape)
    if per_slot:
        start = start.expand(-1, shapes[names[0]][0], -1)

    def values(flat: Tensor) -> dict[str, Tensor]:
        if slots:
            return {names[0]: flat.expand(-1, *shapes[names[0]])}
        parts = torch.split(flat, [int(np.prod(shapes[name])) for name in names], 1)
        return {name: part.reshape(len(part), *shapes[name]) for name, part in zip(names, parts, strict=True)}

    def unlike(flat: Tensor) -> Tensor:
        known = given | values(flat)
        (image,) = decode(*[known[tensor.name] for tensor in spec.inputs])
        return distance(image)

    stream = generator(seed, 1)
    noise = (torch.randn(centre.shape, generator=stream).to(device) for _ in range(steps))
    search = projected(unlike, start, spread, noise, steps)
    return (
        Step({name: value.cpu().numpy().copy() for name, value in values(flat).items()}, far.double().cpu().numpy())
        for flat, far in search
    )


@torch.no_grad()
def _middle(
    model: LatentModel,
    into: GraphSpec | None,
    shapes: Mapping[str, tuple[int, ...]],
    slots: bool,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where to start, `[D]` or of a space of slots `[1, D]`, and how far values lie from there."""
    stds = model.prior_std()
    if into is None:
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        length = sum(sizes[name] * stds[name] ** 2 for name in shapes) ** 0.5
        return torch.zeros(sum(sizes.values()), device=device), torch.tensor(length, device=device)
    stream, module = generator(seed, 0), into.module.to(device)

    def batches() -> Iterator[Tensor]:
        for first in range(0, _DRAWS, _DRAWS_AT_ONCE):
            told = in_turn(model.conditions(), range(first, first + _DRAWS_AT_ONCE))
            known = {name: torch.from_numpy(rows) for name, rows in told.items()}
            for name, shape in model.latent_shapes().items():
                known[name] = stds[name] * torch.randn(_DRAWS_AT_ONCE, *shape, generator=stream)
            outputs = module(*[known[tensor.name].to(device) for tensor in into.inputs])
            found = {tensor.name: output for tensor, output in zip(into.outputs, outputs, strict=True)}
            parts = [found[name] for name in shapes]
            yield parts[0][:, :1] if slots else torch.cat([part.flatten(1) for part in parts], 1)

    centre, spread = centre_of(batches())
    return centre.float(), spread.float()
