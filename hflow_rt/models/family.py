"""The contract every model family keeps, and the registry that finds a family by name.

A family is a folder `hflow_rt/models/<name>/` whose package exposes one `Family` object. Everything else in the
project (training, export, runtime, command line) knows families only through this file.

`forward` always means latents to image, `inverse` image to latents.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from hflow_rt.conditions import Choices, by_folder
from hflow_rt.errors import ConfigError
from hflow_rt.manifest import Role

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Scale = float | NDArray[np.float64]
else:
    Scale = Any  # a number, or a float64 vector with one for each index of a tensor's first axis

__all__ = [
    "FAMILIES",
    "LOG_PROB",
    "Bound",
    "BoundKind",
    "Conditions",
    "Encoding",
    "Family",
    "GraphSpec",
    "LatentModel",
    "LossTerms",
    "ModelConfig",
    "NoiseScale",
    "Published",
    "Role",
    "Scale",
    "Settings",
    "TensorSpec",
    "conditions_by_folder",
    "family",
    "loss_draws",
]

# of bits per dimension: the true upper bound, and what the family's authors published
BoundKind = Literal["strict", "paper"]
LOG_PROB = "log_prob"  # the score that an exact inverse yields, in nats
# one-hot `[B, options]` by name, of every choice of `LatentModel.choices`
Conditions = Mapping[str, "Tensor"]


class Settings(BaseModel):
    """Base of all settings of models: typed, closed, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Settings):
    """Base of every family's settings. Beside `channels` all have `resolution`, the side of the square image.

    A family of colour images alone declares `channels: Literal[3] = 3`.
    """

    channels: Literal[1, 3] = Field(default=3, description="of the image: 3 colours, or 1 for grey")


@dataclass(frozen=True)
class Encoding:
    """What `inverse` yields: latents by name, and `log_prob` `[B]` in nats (see `LatentModel.encode`)."""

    latents: dict[str, Tensor]
    log_prob: Tensor


@dataclass(frozen=True)
class Bound:
    """A bound on bits per dimension: what people call it, and whether it is a true upper one or as published only."""

    title: str
    claim: Literal["upper", "published"]


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


@dataclass(frozen=True)
class TensorSpec:
    """A named float32 tensor of a graph: `shape` without the batch axis, `role` (see the manifest's `Role`), and its
    values' range if bounded.

    std: of a latent's prior at temperature 1. default: of a control.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    range: tuple[float, float] | None = None
    std: float = 1.0
    default: float | None = None


@dataclass(frozen=True)
class GraphSpec:
    """One graph to export.

    module: what is written, with every constant folded; reference: the same function as the model computes it, which
    parity runs in float64 and float32. Both take the inputs in order and return the outputs in order as a tuple.
    nets: modules that mixed precision computes in float16, as patterns of paths within `module` that end in a dot,
    such as `*.decoder.*`. heads: those of them that stay in float32, because what they yield bounds the flow.
    scales: what folding multiplied weights by, layer by layer, so that rounded ones are found again.
    """

    name: str
    module: nn.Module
    reference: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nets: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    scales: tuple[Scale, ...] = ()


if TYPE_CHECKING:
    _Module = nn.Module
else:
    try:
        from torch.nn import Module as _Module
    except ModuleNotFoundError as error:  # reading settings or a manifest needs no torch
        if error.name != "torch":
            raise

        class _Module:
            """Stands in for torch's module."""


class LatentModel(_Module, ABC):
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

    def choices(self) -> Choices:
        """The conditions beside image or latents: options by name, none for most families.

        Each is an input of every graph, a one-hot vector, and an entry of `conditions` and of the latents that
        `decode` takes.
        """
        return {}

    @abstractmethod
    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Latents to images `[B, C, R, R]` in [0, 1] (clamped). Raises `DataError` if a latent does not fit."""

    @abstractmethod
    def encode(self, images: Tensor, conditions: Conditions | None = None) -> Encoding:
        """Images `[B, C, R, R]` in [0, 1] to latents and log-probability. Raises `DataError` on a wrong shape."""

    @abstractmethod
    def loss(
        self, images: Tensor, noise: Mapping[str, Tensor] | None = None, conditions: Conditions | None = None
    ) -> LossTerms:
        """Training loss for a batch made by `dequantize`.

        `noise` gives every standard normal draw by name (`noise_shapes`, each `[B, *shape]`); without it they
        come from torch's default generator.
        """

    @abstractmethod
    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes without batch of the standard normal draws of one loss, in the order they are used."""

    def bounds(self) -> dict[BoundKind, Bound]:
        """The bounds on bits per dimension that there are, the one to quote first; none without a likelihood."""
        return {}

    def bound_inputs(
        self, bound: BoundKind, pixels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> dict[str, Tensor]:
        """One draw of everything random in a bound of uint8 images `[B, C, R, R]`, as inputs of `bound_terms`.

        `image` in [0, 1], `uniform` noise in [0, 1) of the pixels, the family's own noises and the conditions, each
        `[B, *shape]`. Families with `bounds` have it. Raises `ConfigError` where the settings admit no such bound.
        """
        raise NotImplementedError

    def bound_terms(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the graph `bound` computes of `bound_inputs`, whichever bound they are of: parts `[B]` that sum to it.

        All are in bits per dimension of the image. A part is called `LATENT.WHAT`, such as `z0.prior`;
        `image.bits` where a family tells no parts apart.
        """
        raise NotImplementedError

    def noise_scales(self) -> dict[str, NoiseScale]:
        """Running scale of every posterior by latent name; empty for a family that has none."""
        return {}

    def estimate_spreads(self, batches: Iterable[Tensor]) -> int:
        """Set the running noise scales, which published files lack, from uint8 images `[B, C, R, R]`.

        Returns how many images it saw. Raises `DataError` for fewer than two. Families with `noise_scales` have it.
        """
        raise NotImplementedError

    @abstractmethod
    def initialize(self, pixels: Tensor, generator: torch.Generator) -> None:
        """Data-dependent initialisation from uint8 images `[B, C, R, R]`; called once before training."""

    @abstractmethod
    def dequantize(self, pixels: Tensor, generator: torch.Generator | None, noise_std: float = 0.0) -> Tensor:
        """uint8 images to what `loss` takes: uniform noise within the bin, then Gaussian noise of `noise_std`.

        Without a generator both are off and every pixel stands at the centre of its bin.
        """

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by optimizer group; the training settings give each group its learning rate."""

    def routes(self) -> dict[str, str]:
        """The graph that leads from latents to image, `forward`, and that from image to latents, `inverse`."""
        return {"forward": "forward", "inverse": "inverse"}

    def absent(self) -> dict[str, str]:
        """Why there is no such route, in one sentence, for those of `forward` and `inverse` that are not there."""
        return {}

    @abstractmethod
    def graphs(self) -> dict[str, GraphSpec]:
        """What export can write, by name: those of `routes`, of `spaces`, and on request `bound`, see `bound_inputs`.

        Everything that does not depend on the input is folded in float64; nothing random is inside.
        """

    @abstractmethod
    def folded(self) -> LatentModel:
        """A float32 inference copy of the same map with every constant folded in float64."""

    def spaces(self) -> dict[str, tuple[str, str]]:
        """Other spaces to interpolate in, by name: the graph from some latents into it and the graph back."""
        return {}


@dataclass(frozen=True)
class Published:
    """What a family's reader makes of a checkpoint that others published.

    state: weights under our names, float32; all that `LatentModel.state_dict` has. dropped: tensors that are not
    needed, by kind. notes: what the user has to know. part, prefix, passed_over: where in the file they lie, see
    `hflow_rt.foreign.parts.Part`.
    """

    config: ModelConfig
    state: Mapping[str, Tensor]
    dropped: Mapping[str, int]
    notes: tuple[str, ...] = ()
    part: str = "."
    prefix: str = ""
    passed_over: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """How the rest of the project finds a family: its settings class, presets, model class.

    tiny: settings like a preset's, of a model with every part that others have and as small as can be, on which the
    contract is tested. read_published: reads a published checkpoint and, where that does not hold them, its settings
    from another file; of a checkpoint that holds several networks the part that the third argument names. Executes
    nothing. Raises `CheckpointError` and `ConfigError`.
    """

    name: str
    title: str
    config: type[ModelConfig]
    presets: Mapping[str, Mapping[str, Any]]
    tiny: Mapping[str, Any]
    build: Callable[[Any], LatentModel]
    read_published: Callable[[Path, Path | None, str | None], Published] | None = None


# name -> module that holds `FAMILY`; one line a family
FAMILIES = {
    "glow": "hflow_rt.models.glow",
    "hflow": "hflow_rt.models.hflow",
}


def loss_draws(model: LatentModel, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """What `model.loss` takes, for uint8 images `[B, C, R, R]`, on their device."""
    import torch

    images = model.dequantize(pixels, generator)
    shapes = model.noise_shapes()
    noise = {name: torch.randn(len(images), *shape, generator=generator) for name, shape in shapes.items()}
    return images, {name: draw.to(images.device) for name, draw in noise.items()}


def conditions_by_folder(model: LatentModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Conditions of images of a set by their names, see `by_folder`. Raises `DataError`."""
    import torch

    return {name: torch.from_numpy(rows) for name, rows in by_folder(model.choices(), names).items()}


def family(name: str) -> Family:
    """The family called `name`. Raises `ConfigError` for an unknown one."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family '{name}'; known: {', '.join(sorted(FAMILIES))}")
    found: Family = importlib.import_module(FAMILIES[name]).FAMILY
    return found
