"""Settings of an INR-GAN (spec sections 2-5). Stages are named by side, 4 to `resolution`, each twice the last.

Stages up to `input_side` all compute on the grid of that side; beyond it, each doubles the grid.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hflow_rt.models.registry import ModelConfig, Settings, View

__all__ = ["FIRST_STAGE", "DiscriminatorConfig", "EmbeddingConfig", "INRGANConfig", "width"]

FIRST_STAGE = 4
_LARGEST_SIDE = 4096

# of transforms, see `augment.py`
Pipe = Literal["none", "blit", "geom", "color", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc"]

_Side = Annotated[int, Field(ge=FIRST_STAGE, le=_LARGEST_SIDE)]
_Width = Annotated[int, Field(ge=1, le=1 << 14)]
_Base = Annotated[int, Field(ge=1, le=1 << 24)]
_Steps = Annotated[int, Field(ge=1, le=10_000)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Weight = Annotated[float, Field(ge=0, le=1e6)]


def width(base: int, most: int, stage: int) -> int:
    """Channels of a stage: `base` shared out over the side, `most` at most."""
    return max(min(base // stage, most), 1)


class EmbeddingConfig(Settings):
    """What a pixel knows of its place on a grid: waves along fixed directions, and a learned map."""

    const: Annotated[int, Field(ge=1, le=4096)] = Field(description="channels of the learned map")
    random: Annotated[int, Field(ge=0, le=4096)] = Field(default=0, description="waves of random direction and length")
    diagonal: bool = Field(default=False, description="waves along the diagonals too")
    cosine: bool = Field(default=True, description="the cosine of every wave beside its sine")

    def waves(self, side: int) -> int:
        """How many, on a grid of `side`."""
        return octaves(side) * (4 if self.diagonal else 2) + self.random

    def channels(self, side: int) -> int:
        """Of the whole embedding."""
        return self.waves(side) * (2 if self.cosine else 1) + self.const


def octaves(side: int) -> int:
    """Waves of one direction: the longest spans the grid, and each is half as long as the one before."""
    return (side - 1).bit_length()


class DiscriminatorConfig(Settings):
    """The judge of images, which trains with the generator and does not ship."""

    channel_base: _Base = 32768
    channel_max: _Width = 512
    group: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=4, description="images whose spread it sees, a power of two; a larger micro-batch must be a multiple"
    )

    @model_validator(mode="after")
    def _check(self) -> "DiscriminatorConfig":
        if self.group & (self.group - 1):
            raise ValueError(f"group must be a power of two, not {self.group}")
        return self

    def width(self, stage: int) -> int:
        """Channels of a stage."""
        return width(self.channel_base, self.channel_max, stage)


class INRGANConfig(ModelConfig):
    """A network from coordinates to colours, whose weights z modulates; see `network.py`."""

    resolution: _Side
    bits: Annotated[int, Field(ge=1, le=8)] = Field(default=8, description="of the data; fewer than 8 drop the lowest")
    input_side: _Side = 32
    upsampling: Literal["nearest", "bilinear"] = Field(
        default="nearest", description="bilinear also divides features by their spread over the image"
    )

    z_dim: Annotated[int, Field(ge=1, le=1 << 14)] = 512
    w_dim: Annotated[int, Field(ge=1, le=1 << 14)] = 512
    classes: tuple[str, ...] = Field(default=(), description="names of classes, for a conditional model")
    mapping_layers: Annotated[int, Field(ge=1, le=32)] = 2
    rank: Annotated[int, Field(ge=1, le=1024)] = Field(default=10, description="of the modulation of a layer's weights")
    channel_base: _Base = 32768
    channel_max: _Width = 512
    extra_layers: dict[_Side, Annotated[int, Field(ge=1, le=64)]] = Field(
        default={}, description="further layers by side of the grid"
    )
    embeddings: dict[_Side, EmbeddingConfig] = Field(description="by side of the grid, every one from input_side on")

    psi: Annotated[float, Field(ge=0, le=2)] = Field(default=1.0, description="truncation, unless said otherwise")
    w_avg_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    view: View | None = Field(default=None, description="what is drawn instead of the image as it was trained")

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    r1_gamma: _Weight = Field(default=10.0, description="weight of the gradient penalty on real images")
    r1_every: _Steps = Field(default=16, description="steps between its phases")
    path_weight: _Weight = Field(default=0.0, description="of how unevenly w changes images")
    path_every: _Steps = Field(default=4, description="steps between its phases")
    style_mixing: _Share = Field(default=0.0, description="of the steps, in which images are of two w")

    augment: Pipe = Field(default="none", description="what the discriminator sees is augmented by")
    augment_target: _Share = Field(default=0.6, description="mean sign of its logits at real images, to adapt to")
    augment_images: Annotated[int, Field(ge=1, le=1 << 40)] = Field(
        default=500_000, description="until the probability has gone from 0 to 1, at most"
    )
    augment_start: _Share = Field(default=0.0, description="probability at first")
    augment_every: _Steps = Field(default=4, description="steps between its changes")

    @property
    def stages(self) -> tuple[int, ...]:
        """Their names."""
        return tuple(FIRST_STAGE << index for index in range((self.resolution // FIRST_STAGE).bit_length()))

    @property
    def slots(self) -> int:
        """How many layers take a w of their own; the last one is the last map to colours."""
        return sum(self.layers(stage) for stage in self.stages) + 1

    def layers(self, stage: int) -> int:
        """Of a stage, its map to colours aside."""
        return (1 if stage == FIRST_STAGE else 2) + self.extra_layers.get(self.grid(stage), 0)

    def grid(self, stage: int) -> int:
        """Side of the grid that a stage computes on."""
        return max(stage, self.input_side)

    def width(self, stage: int) -> int:
        """Channels of a stage."""
        return width(self.channel_base, self.channel_max, stage)

    @model_validator(mode="after")
    def _check(self) -> "INRGANConfig":
        for name in ("resolution", "input_side"):
            if (side := getattr(self, name)) & (side - 1):
                raise ValueError(f"{name} must be a power of two, not {side}")
        if self.input_side > self.resolution:
            raise ValueError(f"input_side must be at most resolution = {self.resolution}, not {self.input_side}")
        sides = [stage for stage in self.stages if stage >= self.input_side]
        if set(self.embeddings) != set(sides):
            raise ValueError(f"embeddings must be of sides {sides}, not {sorted(self.embeddings)}")
        # at the input side they would stand in every low stage, which nobody has trained
        if wrong := sorted(set(self.extra_layers) - set(sides[1:])):
            raise ValueError(f"extra_layers must be of sides {sides[1:]}, not {wrong[0]}")
        if self.view is not None and self.view.resolution % self.resolution:
            near = self.resolution * max(round(self.view.resolution / self.resolution), 1)
            raise ValueError(
                f"resolution must be a multiple of the model's {self.resolution}; found {self.view.resolution};"
                f" choose {near}"
            )
        if len(self.classes) == 1 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must be two different names or more, or none, not {list(self.classes)}")
        return self
