"""What a manifest says of a model, and the tables that go beside it: loops' schedules and the bank of its prior."""

from collections.abc import Collection, Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from hflow_rt import manifest
from hflow_rt.choices import Route
from hflow_rt.models.family import LatentModel, Loop, TensorSpec

__all__ = ["TABLES", "described", "described_tensor", "latents_of", "tables_of"]

_BANK = "bank.safetensors"
TABLES = (_BANK, *(f"{route}.schedule.safetensors" for route in get_args(Route)))  # files that a bundle may have


def described(model: LatentModel, ways: Mapping[Route, str | Loop], graphs: Collection[str]) -> dict[str, Any]:
    """Fields of the manifest of a bundle with these routes and graphs of the model."""
    files = _schedules(ways)
    return {
        "config": model.config.model_dump(mode="json"),
        "resolution": model.resolution,
        "latents": latents_of(model),
        "conditions": dict(model.conditions()),
        "routes": {route: way if isinstance(way, str) else _loop(way, files[route]) for route, way in ways.items()},
        "absent": dict(model.absent()),
        "bank": _BANK if model.bank() else None,
        "spaces": {
            name: manifest.Space(**vars(space))
            for name, space in model.spaces().items()
            if {*space.graphs} <= {*graphs}
        },
    }


def tables_of(model: LatentModel, ways: Mapping[Route, str | Loop]) -> dict[str, dict[str, NDArray[np.floating]]]:
    """Contents of the files that `described` names, arrays by name: float32, or float16 where that loses nothing."""
    files = _schedules(ways)
    found = {
        files[route]: {name: _smallest(table) for name, table in way.schedule.items()}
        for route, way in ways.items()
        if isinstance(way, Loop)
    }
    if bank := model.bank():
        found[_BANK] = {name: _smallest(rows.detach().float().cpu().numpy()) for name, rows in bank.items()}
    return found


def _smallest(table: NDArray[np.floating]) -> NDArray[np.floating]:
    exact = np.ascontiguousarray(table, np.float32)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), exact) else exact


def latents_of(model: LatentModel) -> tuple[manifest.Latent, ...]:
    """The latents and their priors."""
    stds, prior, ways = model.prior_std(), model.prior(), model.ways()
    return tuple(
        manifest.Latent(
            name=name, shape=shape, prior_std=stds[name], prior=prior.get(name, "normal"), way=ways.get(name)
        )
        for name, shape in model.latent_shapes().items()
    )


def described_tensor(tensor: TensorSpec) -> manifest.Tensor:
    """A tensor of a graph."""
    return manifest.Tensor(
        name=tensor.name, shape=tensor.shape, role=tensor.role, range=tensor.range, default=tensor.default
    )


def _schedules(ways: Mapping[Route, str | Loop]) -> dict[Route, str]:
    """Files of the loops' schedules; routes of the same tables share one."""
    found: dict[Route, tuple[str, Mapping[str, NDArray[np.float32]]]] = {}
    for route, way in ways.items():
        if isinstance(way, Loop):
            same = (file for file, tables in found.values() if _equal(tables, way.schedule))
            found[route] = next(same, f"{route}.schedule.safetensors"), way.schedule
    return {route: file for route, (file, _) in found.items()}


def _equal(tables: Mapping[str, NDArray[np.float32]], others: Mapping[str, NDArray[np.float32]]) -> bool:
    return tables.keys() == others.keys() and all(np.array_equal(tables[name], others[name]) for name in tables)


def _loop(loop: Loop, schedule: str) -> manifest.Loop:
    return manifest.Loop(
        start=loop.start,
        step=loop.step,
        steps=loop.steps,
        schedule=schedule,
        carry=dict(loop.carry),
        last=loop.last,
        every=dict(loop.every),
        leads_to=loop.leads_to,
    )
