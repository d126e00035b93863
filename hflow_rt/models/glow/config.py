"""Settings of a Glow model (spec sections 1-4). Defaults are the paper's; the others are the options of spec 11."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hflow_rt.models.registry import ModelConfig

__all__ = ["Edge", "GlowConfig"]

Edge = Literal["zero", "ones", "indicator"]
_LARGEST_SIDE = 4096


class GlowConfig(ModelConfig):
    """`levels` of `steps` flow steps each; every level halves the side and doubles the channels it hands on."""

    channels: Literal[3] = 3
    resolution: Annotated[int, Field(ge=2, le=_LARGEST_SIDE)]
    levels: Annotated[int, Field(ge=1, le=12)] = 3
    steps: Annotated[int, Field(ge=1, le=4096)] = 32
    hidden_channels: Annotated[int, Field(ge=1, le=1 << 14)] = 512
    coupling: Literal["affine", "additive"] = "affine"
    scale: Literal["sigmoid", "exp_sigmoid"] = Field(
        default="sigmoid", description="the multiplier of an affine coupling: sigmoid(r + 2) or exp(sigmoid(r + 2))"
    )
    moving: Literal["second", "first"] = Field(default="second", description="the half of the channels that changes")
    hidden: Literal["actnorm", "bias"] = Field(default="actnorm", description="what follows the hidden convolutions")
    edge: Edge = Field(
        default="indicator",
        description="beyond the border 3x3 convolutions see zeros; also an indicator channel; or, the last one, ones",
    )
    permutation: Literal["conv1x1", "shuffle", "reverse"] = "conv1x1"
    lu: bool = Field(default=False, description="factorise the 1x1 matrices")
    split_prior: bool = Field(default=True, description="learn the prior of what a level splits off")
    top_prior: Literal["learned", "fixed"] = "learned"
    classes: tuple[str, ...] = Field(
        default=(), max_length=1 << 14, description="names of the classes that the top prior depends on"
    )
    classifier: bool = Field(default=False, description="predict the class from the top latent, as a part of the loss")
    class_weight: float = Field(default=0.01, ge=0, description="of the classifier's cross-entropy in bits")
    bits: Annotated[int, Field(ge=1, le=8)] = Field(default=8, description="of the data; fewer than 8 drop the lowest")
    invertible_backward: bool = Field(
        default=True, description="recompute activations from outputs, so that memory does not grow with the steps"
    )

    def width(self, level: int) -> int:
        """Channels inside level `level`, 0 being the finest."""
        return int(12 * 2**level)

    def side(self, level: int) -> int:
        """Side of the tensor inside a level."""
        return self.resolution >> (level + 1)

    @model_validator(mode="after")
    def _check(self) -> "GlowConfig":
        if self.resolution % 2**self.levels:
            raise ValueError(
                f"resolution must be divisible by 2^levels = {2**self.levels}, not {self.resolution}; use fewer levels"
            )
        if self.classifier and not self.classes:
            raise ValueError("a classifier needs classes")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("every class needs a name of its own")
        return self
