"""What an evaluation found, as figures with names, titles and units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "Estimate", "Evaluation", "Figure"]

BITS = "bits/dim"
_FORMER = {"strict": "strict bound", "paper": "paper's bound"}  # all that evaluations had before figures had names


class Estimate(NamedTuple):
    """Mean over `n` images, and the standard error of that mean over images (NaN for a single one)."""

    mean: float
    standard_error: float
    n: int

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Estimate:
        """From the finite values of images `[n]`."""
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), float(error), len(values))

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        error = None if math.isnan(self.standard_error) else self.standard_error
        return {"mean": self.mean, "standard_error": error, "n": self.n}

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> Estimate:
        """From what `dump` yields."""
        error = values["standard_error"]
        return cls(values["mean"], math.nan if error is None else error, values["n"])


class Figure(NamedTuple):
    """A number that was measured: what people call it, and its unit, empty if it has none."""

    title: str
    estimate: Estimate
    unit: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Figures after `images` training images, the one to quote first.

    reasons: why a figure is not there, by its name. reason: why there are none at all. of: what was looked at,
    `held-out` images or `samples`.
    """

    images: int
    figures: dict[str, Figure] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    of: str = "held-out"

    @property
    def quoted(self) -> Figure | None:
        """The first figure, if there is any."""
        return next(iter(self.figures.values()), None)

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        figures = {
            name: {"title": figure.title, "unit": figure.unit, **figure.estimate.dump()}
            for name, figure in self.figures.items()
        }
        about = {"reasons": self.reasons, "reason": self.reason, "of": self.of}
        return {"images": self.images, "figures": figures, **about}

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> Evaluation:
        """From what `dump` yields, or yielded when there were two bounds with names of their own."""
        if "figures" not in values:
            return cls._former(values)
        figures = {
            name: Figure(one["title"], Estimate.load(one), one["unit"]) for name, one in values["figures"].items()
        }
        of = values.get("of", cls.of)  # versions before knew no other
        return cls(values["images"], figures, dict(values["reasons"]), values["reason"], of)

    @classmethod
    def _former(cls, values: Mapping[str, Any]) -> Evaluation:
        errors = {"strict": values["standard_error"], "paper": None}
        figures = {
            name: Figure(
                title, Estimate.load({"mean": values[name], "standard_error": error, "n": values["held_out"]}), BITS
            )
            for name, title in _FORMER.items()
            for error in [errors[name]]
            if values[name] is not None
        }
        reason = values["reason"]
        if reason is None or not figures:
            return cls(values["images"], figures, {}, reason)
        return cls(values["images"], figures, {"strict": reason})
