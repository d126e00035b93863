"""The contract every model family keeps. Training, export, runtime and commands know a model only through this file.

`forward` always means latents to image, `inverse` image to latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hflow_rt.choices import Route
from hflow_rt.conditions import Options, by_folder
from hflow_rt.errors import ConfigError
from hflow_rt.manifest import LOG_PROB, Prior, Role, Way
from hflow_rt.models.registry import ModelConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.evaluation.figures import Figure
    from hflow_rt.models.plan import TrainingPlan
    from hflow_rt.training.config import TrainingConfig

    Gain = float | NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]
else:
    # a number, a float64 vector with one for each index of a tensor's first axis, or two, the other for its second axis
    Gain = Any

__all__ = [
    "LOG_PROB",
    "Bound",
    "Conditions",
    "Gain",
    "GraphSpec",
    "LatentModel",
    "Loop",
    "LossTerms",
    "NoiseScale",
    "Prior",
    "Role",
    "Route",
    "Space",
    "TensorSpec",
    "Unknown",
    "Way",
    "conditions_by_folder",
]

# one-hot `[B, options]` by name, of every choice of `LatentModel.conditions`
Conditions = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bound:
    """A bound on bits per dimension: what people call it, and what it claims.

    claim: the exact figure, a true upper bound, or what the family's authors published, which need not bound anything
    and takes one draw. combine: how draws of an image become one: their mean, or the logarithm of the mean of their
    likelihoods, which is the importance-weighted bound where each draw is of one weight. unit: what it is quoted in.
    """

    title: str
    claim: Literal["exact", "upper", "published"]
    combine: Literal["mean", "logmeanexp"] = "mean"
    unit: Literal["bits/dim", "nats"] = "bits/dim"


@dataclass(frozen=True)
class LossTerms:
    """A training loss.

    loss: scalar to minimise (a mean over the batch). bits_per_dim: detached scalar, the family's published bound;
    None while training leaves parts of the model alone, and in a family without likelihood. terms: detached scalars
    for the log, by name.
    """

    loss: Tensor
    bits_per_dim: Tensor | None
    terms: dict[str, Tensor]


class NoiseScale(NamedTuple):
    """Posterior noise of one latent's target: `relative` to the running `spread` of the target over the data."""

    relative: float
    spread: float

    @property
    def std(self) -> float:
        """The noise itself."""
        return self.relative * self.spread


class Unknown(NamedTuple):
    """What published files lack, in words; how many images tell it well; what is so for want of it."""

    what: str
    images: int
    without: str


@dataclass(frozen=True)
class TensorSpec:
    """A named float32 tensor of a graph: `shape` without the batch axis, `role` (see the manifest's `Role`), and its
    values' range if bounded.

    std: of a latent's prior at temperature 1. default: of a control; of noise that is the same in every image unless
    somebody asks for more, such as that of a posterior. A `schedule` has one row for all images.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    range: tuple[float, float] | None = None
    std: float = 1.0
    default: float | None = None

    def batched(self, batch: int) -> tuple[int, ...]:
        """Its shape in a call with `batch` images."""
        return (1 if self.role == "schedule" else batch, *self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """One graph to export.

    module: what is written, with every constant folded; reference: the same function as the model computes it, which
    parity runs in float64 and float32. Both take the inputs in order and return the outputs in order as a tuple.
    nets: modules that mixed precision computes in float16, as patterns of paths within `module` that end in a dot,
    such as `*.decoder.*`. heads: those of them that stay in float32, because what they yield bounds the flow.
    gains: what folding multiplied weights by, layer by layer, so that rounded ones are found again.
    """

    name: str
    module: nn.Module
    reference: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nets: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    gains: tuple[Gain, ...] = ()


@dataclass(frozen=True)
class Loop:
    """A route of several calls: the graph `start` once, then `step` once a row of the schedule.

    schedule: float32 tables `[K, *shape]` by input of `step`, K calls, at least one table. carry: output that both
    graphs have, to the input of `step` that it becomes in the next call. Every other input of `step` is, by name, a
    draw of its own for each call (roles noise and uniform, `[B, K, *shape]` as inputs of the route), what `start`
    yielded, or what the route was given. The route yields outputs of the `last` call by name, those of `every` call
    stacked `[B, K, *shape]` under the names of this mapping, and what of `start` is a latent. K is never unrolled.
    leads_to: tables that say where a call leads. Where there are any, a loop may be of fewer calls than K: of rows
    evenly chosen, in each of which these tables have the row before the next one that was chosen.
    """

    start: str
    step: str
    schedule: Mapping[str, NDArray[np.float32]]
    carry: Mapping[str, str]
    last: tuple[str, ...] = ()
    every: Mapping[str, str] = field(default_factory=dict)
    leads_to: tuple[str, ...] = ()

    @property
    def graphs(self) -> tuple[str, str]:
        """What it runs."""
        return self.start, self.step

    @property
    def steps(self) -> int:
        """How often `step` runs."""
        return len(next(iter(self.schedule.values())))


@dataclass(frozen=True)
class Space:
    """Another space than the latents' own, by the graphs into it, back, and from it straight to the image.

    One without `back` is left through `decode` only; one without `into` is reached by projection only. draw: of a space
    of distributions, the graph that draws an image by its inputs of roles noise and uniform, where the latents' own
    image is the mean.
    slots: its tensor is `[S, D]` for S layers, coarse to fine, whose rows are equal where `into` leads and need not be.
    """

    into: str | None = None
    back: str | None = None
    decode: str | None = None
    draw: str | None = None
    slots: bool = False

    @property
    def graphs(self) -> tuple[str, ...]:
        """Those that it has."""
        return tuple(name for name in (self.into, self.back, self.decode, self.draw) if name is not None)


class LatentModel(nn.Module, ABC):
    """A reference model. Public images are float32 `[B, C, R, R]` in [0, 1]; latents are a dict of `[B, *shape]`.

    C is 3, or 1 where the settings say that images are grey. An 8-bit image `v` enters as `v / 255` and stands at the
    centre of its bin. Log-probabilities are densities in units where one bin is 1/2^bits wide, so bits per dimension
    are `-log_prob / (D ln 2) + bits`, D = C R R, with `bits` 8 unless the settings say otherwise.
    """

    config: ModelConfig

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side of the image in pixels."""

    @property
    def channels(self) -> int:
        """C, of the image."""
        return self.config.channels

    @abstractmethod
    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape without batch, coarse to fine; this order is the order everywhere."""

    @abstractmethod
    def prior_std(self) -> dict[str, float]:
        """Standard deviation of each latent at temperature 1."""

    def conditions(self) -> Options:
        """The conditions beside image or latents: options by name, none for most families.

        Each is an input of every graph, a one-hot vector, and an entry of `conditions` and of the latents that
        `decode` takes.
        """
        return {}

    @abstractmethod
    def plan(self, settings: TrainingConfig) -> TrainingPlan:
        """How it is trained; what a family needs to know beside the training settings is in its own config."""

    def bounds(self) -> dict[str, Bound]:
        """The bounds on bits per dimension that there are, the one to quote first; none without a likelihood."""
        return {}

    def bound_inputs(
        self, bound: str, pixels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> dict[str, Tensor]:
        """One draw of everything random in a bound of uint8 images `[B, C, R, R]`, as inputs of `bound_terms`.

        `image` in [0, 1], `uniform` noise in [0, 1) of the pixels, the family's own noises and the conditions, each
        `[B, *shape]`. Families with `bounds` have it. Raises `ConfigError` where the settings admit no such bound.
        """
        raise NotImplementedError

    def bound_features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the graph `features` computes of the images in `bound_inputs`: more inputs of `bound_terms` by name.

        It is computed once for all draws of an image; most families have nothing of the kind, and no such graph.
        """
        return {}

    def bound_terms(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the graph `bound` computes of `bound_inputs`, whichever bound they are of: parts `[B]` that sum to it.

        inputs: `bound_features` too. All are in bits per dimension of the image. A part is called `LATENT.WHAT`, such
        as `z0.prior`; `image.bits` where a family tells no parts apart. Rows `[B, n]` beside them are no parts:
        `bound_figures` tells of them.
        """
        raise NotImplementedError

    def bound_figures(self, means: Mapping[str, NDArray[np.float64]]) -> dict[str, Figure]:
        """What is told of the means over images, `[n]`, of rows that `bound_terms` gives beside parts."""
        return {}

    def bits_by_step(self, pixels: Tensor, streams: Sequence[torch.Generator]) -> Iterator[Tensor] | None:
        """What every call of the loop `forward` adds to the bound of uint8 images `[B, C, R, R]`, bits/dim `[B]` each.

        streams: one of each image, for all that is drawn for it. None for families without such a loop.
        """
        return None

    def noise_scales(self) -> dict[str, NoiseScale]:
        """Running scale of every posterior by latent name; empty for a family that has none."""
        return {}

    def unknown(self) -> Unknown | None:
        """What a published file of this model lacks, and images tell; None where nothing."""
        return None

    def learn(self, batches: Iterable[Tensor]) -> int:
        """Set what is `unknown` from uint8 images `[B, C, R, R]`; returns how many it saw.

        Raises `DataError` for too few. Families with anything `unknown` have it.
        """
        raise NotImplementedError

    def calibrate(self, latents: Iterable[Mapping[str, Tensor]]) -> None:
        """Move to those of samples, once before export, what statistics training left; latents `[B, *shape]` a step.

        Raises `ConfigError` in a family that has none.
        """
        raise ConfigError("models of this family have nothing to calibrate; omit --calibrate")

    def routes(self) -> Mapping[Route, str | Loop]:
        """What leads from latents to image, `forward`, and from image to latents, `inverse`: a graph or a loop."""
        return {"forward": "forward", "inverse": "inverse"}

    def absent(self) -> Mapping[Route, str]:
        """Why there is no such route, in one sentence, for those of `forward` and `inverse` that are not there."""
        return {}

    def round_trip(self) -> Literal["exact", "lossy"] | None:
        """Whether an image comes back from its latents: within rounding, about, or not at all for want of a route."""
        return None if self.absent() else "exact"

    def prior(self) -> Mapping[str, Prior]:
        """Where each latent of a sample comes from, by name; normal where nothing is said."""
        return {}

    def ways(self) -> Mapping[str, Way]:
        """How interpolations take latents from one image to another, by name; by their mode where nothing is said."""
        return {}

    def bank(self) -> Mapping[str, Tensor]:
        """Latents of real images, `[rows, *shape]`, of those whose prior is a bank; a sample takes one row of all."""
        return {}

    @abstractmethod
    def graphs(self) -> dict[str, GraphSpec]:
        """What export can write, by name: those of `routes`, of `spaces`, and on request `bound`, see `bound_inputs`.

        Everything that does not depend on the input is folded in float64; a graph contains nothing random. One that
        takes values which another yields comes after it.
        """

    def spaces(self) -> Mapping[str, Space]:
        """Other spaces than that of the latents, by name."""
        return {}

    def unclamped(self, graph: str) -> nn.Module:
        """A graph that yields an image, before that is held to [0, 1] if possible: beyond it nothing has a gradient."""
        return self.graphs()[graph].module


def conditions_by_folder(model: LatentModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Conditions of images of a set by their names, see `by_folder`. Raises `DataError`."""
    return {name: torch.from_numpy(rows) for name, rows in by_folder(model.conditions(), names).items()}
