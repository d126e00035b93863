"""Calibration: what a model learns of its own samples before export, at a stated std and seed, see `LatentModel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hflow_rt.errors import ConfigError
from hflow_rt.manifest import CALIBRATED
from hflow_rt.runtime.noise import draw_latents, parse_std

if TYPE_CHECKING:
    from torch import Tensor

    from hflow_rt.models.family import LatentModel

__all__ = ["Calibration", "calibrate", "check_calibrated", "parse_calibration"]

_BATCH = 16  # images of a step, as published
_STEPS = 500


class Calibration(NamedTuple):
    """std: in the form of `parse_std`. steps: of sixteen samples each. seed: of these."""

    std: tuple[str, ...] = ("0.7",)
    steps: int = _STEPS
    seed: int = 0

    def words(self) -> str:
        """As it is typed."""
        stds = [text if "=" in text else f"std={text}" for text in self.std]
        return ",".join([*stds, f"steps={self.steps}", f"seed={self.seed}"])


def parse_calibration(text: str) -> Calibration:
    """`std=0.6,steps=500,seed=0`, of which any part may be missing, and NAME=S for one latent. Raises `ConfigError`."""
    found, stds = Calibration(), []
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise ConfigError(f"--calibrate takes std=S,steps=N,seed=N; found '{part}' in it")
        if name in ("steps", "seed"):
            if not value.isdigit() or (name == "steps" and not 1 <= int(value) <= 1_000_000):
                raise ConfigError(f"--calibrate {name} must be a whole number, of steps at least 1; found '{value}'")
            found = found._replace(steps=int(value)) if name == "steps" else found._replace(seed=int(value))
        else:
            stds.append(value if name == "std" else f"{name}={value}")
    return found._replace(std=tuple(stds)) if stds else found


def calibrate(model: LatentModel, metadata: Mapping[str, Any], text: str) -> dict[str, str] | None:
    """Calibrate in place; what to say of the weights, or None where they are calibrated just so already.

    metadata: what is said of them now. Raises `ConfigError`, and `DataError` for an std that cannot be.
    """
    wanted = parse_calibration(text)
    if metadata.get(CALIBRATED) == wanted.words():
        return None
    if CALIBRATED in metadata:
        raise ConfigError(
            f"these weights were calibrated at {metadata[CALIBRATED]}; export the run that they were made from"
        )
    model.calibrate(_samples(model, wanted))
    return {CALIBRATED: wanted.words()}


def check_calibrated(known: str | None, std: Sequence[str]) -> None:
    """Raise `ConfigError` unless weights were calibrated, `known` tells how, for samples of just this `std`."""
    if known is None:
        asked = ",".join(text if "=" in text else f"std={text}" for text in std) or "std=S"
        raise ConfigError(
            "this bundle was not calibrated, so there are no calibrated figures; omit --calibrated, or first run "
            f"'hflow-rt export RUN --calibrate {asked}'"
        )
    if (made := parse_calibration(known).std) != tuple(std):
        raise ConfigError(
            f"this bundle was calibrated for samples of std {' '.join(made)}, not {' '.join(std)}; omit --calibrated, "
            "or give --std as it was calibrated"
        )


def _samples(model: LatentModel, wanted: Calibration) -> Iterator[dict[str, Tensor]]:
    """Latents of the images 0, 1, ... of the seed, a step at a time."""
    import torch

    shapes, priors = model.latent_shapes(), model.prior_std()
    stds = parse_std(list(wanted.std), shapes)
    for step in range(wanted.steps):
        drawn = draw_latents(shapes, priors, wanted.seed, range(_BATCH * step, _BATCH * (step + 1)), stds)
        yield {name: torch.from_numpy(values) for name, values in drawn.items()}
