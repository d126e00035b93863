"""Settings of an IHDM model (spec sections 1-3). `steps` are the levels of blur, K; each is one call of the network."""

from typing import Annotated

from pydantic import Field, model_validator

from hflow_rt.models.registry import ModelConfig

__all__ = ["GROUPS", "IHDMConfig"]

GROUPS = 32  # of every normalisation
_LARGEST_SIDE = 4096

_Std = Annotated[float, Field(gt=0, le=10)]


class IHDMConfig(ModelConfig):
    """Levels 0 (sharp) to `steps` (blurriest); a U-Net whose stage i works at side `resolution / (patch 2^i)`."""

    resolution: Annotated[int, Field(ge=4, le=_LARGEST_SIDE)]
    bits: Annotated[int, Field(ge=1, le=8)] = Field(default=8, description="of the data; fewer than 8 drop the lowest")

    steps: Annotated[int, Field(ge=2, le=4000)] = Field(description="levels of blur")
    blur_min: Annotated[float, Field(gt=0, le=_LARGEST_SIDE)] = Field(default=0.5, description="pixels, at level 1")
    blur_max: Annotated[float, Field(gt=0, le=_LARGEST_SIDE)] = Field(description="pixels, at the last level")
    sigma: _Std = Field(default=0.01, description="noise that training adds to blurred images")
    delta: _Std = Field(default=0.0125, description="noise that sampling adds at every level, unless said otherwise")

    patch: Annotated[int, Field(ge=1, le=16)] = Field(
        default=1, description="side of the squares of pixels that the network takes as one"
    )
    base_width: Annotated[int, Field(ge=2, le=1 << 12, multiple_of=2)] = 128
    widths: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        min_length=1, max_length=10, description="channels of every stage, in base widths"
    )
    blocks: Annotated[int, Field(ge=1, le=32)] = Field(description="residual blocks of a stage on the way down")
    attention: tuple[Annotated[int, Field(ge=0, le=9)], ...] = Field(
        default=(), description="stages whose blocks attend, beside the middle"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    train_last_level: bool = Field(
        default=True, description="the published code never trains the level that sampling begins with"
    )
    bank: Annotated[int, Field(ge=0, le=1 << 20)] = Field(
        default=4096, description="training images whose starts are kept, as numbers a few a channel"
    )
    moments: bool = Field(
        default=False, description="mean and variance of training images' waves are kept, which fewer steps need"
    )
    linear_skip: bool = Field(
        default=False,
        description="the network sees the best linear estimate beside its state and corrects that; needs moments",
    )
    noisy_start: bool = Field(default=True, description="sampling begins with noise on the blurred image")

    def width(self, stage: int) -> int:
        """Channels of a stage."""
        return self.base_width * self.widths[stage]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, R, R)`."""
        return self.channels, self.resolution, self.resolution

    @property
    def trained_levels(self) -> int:
        """Training draws levels from 1 to this one."""
        return self.steps if self.train_last_level else self.steps - 1

    @model_validator(mode="after")
    def _check(self) -> "IHDMConfig":
        if self.blur_max < self.blur_min:
            raise ValueError(f"blur_max must be at least blur_min = {self.blur_min}, not {self.blur_max}")
        if self.linear_skip and not self.moments:
            raise ValueError("linear_skip needs moments = true")
        parts = self.patch * 2 ** (len(self.widths) - 1)
        if self.resolution % parts:
            stages = f"{len(self.widths)} stages" + (f" and patches of {self.patch} pixels" if self.patch > 1 else "")
            raise ValueError(f"resolution must be divisible by {parts}, for {stages}, not {self.resolution}")
        for stage in range(len(self.widths)):
            if self.width(stage) % GROUPS:
                raise ValueError(
                    f"base_width times every one of widths must be a multiple of {GROUPS}, not {self.width(stage)}"
                )
        if any(stage >= len(self.widths) for stage in self.attention):
            raise ValueError(f"attention must name stages 0 to {len(self.widths) - 1}, not {max(self.attention)}")
        return self
