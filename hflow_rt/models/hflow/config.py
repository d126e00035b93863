"""Settings of an hflow model (spec section 1): one entry a level, finest first, and the end block.

The original's flat lists (`RESOLUTIONS`, `CHANNELS`, ...) are read by `original.py`.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hflow_rt.layers.masks import PERIODS, split_steps
from hflow_rt.models.registry import ModelConfig, Settings

__all__ = ["CouplingNet", "EndConfig", "HFlowConfig", "LevelConfig", "unet_widths"]

CouplingNet = Literal["cnn", "unet", "unet-unless-channels"]
# a list as long is made while settings are checked
_StepCount = Annotated[int, Field(ge=1, le=4096)]
_Size = Annotated[int, Field(gt=0, le=1 << 16)]


class LevelConfig(Settings):
    """One level: its target's shape, the flow over it, and the encoder and decoder between it and the next coarser."""

    resolution: _Size
    channels: _Size = Field(description="channels of the target the flow models")
    loss_weight: float = Field(
        default=1.0, ge=0, description="0 here and at every finer level: training leaves these levels alone"
    )
    prior_std: float = Field(default=1.0, gt=0)
    noise: float | None = Field(default=None, gt=0, description="posterior std relative to the data's; None for none")

    steps: _StepCount = 8
    split: str = "blocks-channels"
    mixing_scale: float = Field(default=0.3, gt=0)
    unitary: bool = False
    coupling: CouplingNet = "unet-unless-channels"
    coupling_channels: _Size = 32
    coupling_kernel: Literal[1, 3, 5, 7] = 3
    unet_growth: float = 1.2
    unet_depth: _Size = 1
    unet_pointwise: bool = Field(default=True, description="1x1 kernels in the stages ('reduced')")
    unet_double: bool = Field(default=False, description="each stage changes resolution by 4")

    encoder_channels: _Size = 64
    encoder_kernel: Literal[1, 3, 5, 7] = 3
    decoder_channels: _Size = 64
    condition_channels: _Size = 16
    skip_channels: int = Field(default=0, ge=0, description="width of the skip to the next finer decoder; 0 at level 0")
    refine: bool = Field(default=False, description="refinement UNets on the shift heads")
    style: bool = False
    norm: bool = Field(default=False, description="instance norm in the decoder trunk")

    def uses_unet(self, split: str) -> bool:
        """Whether a step with this split has a UNet (else a plain CNN) as its coupling net."""
        if self.resolution < 4 or self.coupling == "cnn":
            return False
        return self.coupling == "unet" or split != "channels"

    @model_validator(mode="after")
    def _check(self) -> "LevelConfig":
        for split in split_steps(self.split, self.steps):
            if split != "channels" and self.resolution % PERIODS[split]:
                raise ValueError(
                    f"split '{split}' needs a resolution divisible by {PERIODS[split]}, not {self.resolution}"
                )
            if split in ("lblocks", "hblocks", "vhalfs", "hhalfs") and not self.uses_unet(split):
                raise ValueError(f"split '{split}' exists only with a UNet coupling net")
        shrink = 2 ** (self.unet_depth * (2 if self.unet_double else 1))
        if self.resolution < shrink and any(self.uses_unet(split) for split in split_steps(self.split, self.steps)):
            raise ValueError(
                f"unet_depth {self.unet_depth} needs a resolution of at least {shrink}, not {self.resolution}"
            )
        if "channels" in split_steps(self.split, self.steps) and self.channels < 2:
            raise ValueError("split 'channels' needs at least 2 channels")
        if self.coupling_channels % 2:
            raise ValueError(f"coupling_channels must be even, not {self.coupling_channels}")
        return self


class EndConfig(Settings):
    """The 1x1 end vector: its parts, the flow over each, and which entries reach style and base."""

    channels: tuple[_Size, ...] = (4, 508)
    condition_channels: tuple[_Size, ...] = (32,)
    steps: tuple[_StepCount, ...] = (8, 8)
    coupling_channels: tuple[_Size, ...] = (64, 512)
    unitary: bool = True
    mixing_scale: float = Field(default=0.1, gt=0)
    noise: tuple[float, ...] | None = (0.05, 0.05)
    style_noise_scale: float = 1.5
    constant_start: bool = Field(default=False, description="the decoder starts from a learned constant alone")
    hidden_from_style: tuple[int, int] = (0, 4)
    hidden_from_base: tuple[int, int] = (0, 512)
    mapping_lr_scale: float = 0.2

    @property
    def width(self) -> int:
        """Length of the whole end vector."""
        return sum(self.channels)

    @model_validator(mode="after")
    def _check(self) -> "EndConfig":
        parts = len(self.channels)
        lengths = {"steps": self.steps, "coupling_channels": self.coupling_channels, "noise": self.noise}
        for name, values in lengths.items():
            if values is not None and len(values) != parts:
                raise ValueError(f"{name} needs one entry for each of the {parts} parts, not {len(values)}")
        if len(self.condition_channels) != parts - 1:
            raise ValueError(f"condition_channels needs {parts - 1} entries (parts after the first)")
        if min(self.channels) < 2 or any(width % 2 for width in self.coupling_channels):
            raise ValueError("every part needs at least 2 channels and an even coupling width")
        return self


class HFlowConfig(ModelConfig):
    """The whole model. `levels[0]` is the image, 3 channels, scaled by 4; the last level must be 8x8."""

    channels: Literal[3] = 3
    levels: tuple[LevelConfig, ...] = Field(min_length=1)
    end: EndConfig
    style_channels: _Size = 512
    encoder_lr_scale: float = 10.0
    decoder_lr_scale: float = 10.0
    bits: int = Field(default=8, ge=1, le=8, description="of the data; fewer than 8 drop the lowest")

    @property
    def resolution(self) -> int:
        """Side of the image."""
        return self.levels[0].resolution

    @property
    def uses_style(self) -> bool:
        """Whether any decoder is modulated by the style vector."""
        return any(level.style for level in self.levels)

    @property
    def maps_style(self) -> bool:
        """Whether the mapping network exists: style is on and not all of the end vector is hidden from it."""
        start, stop = self.end.hidden_from_style
        return self.uses_style and not (start <= 0 and stop >= self.end.width)

    def ratio(self, level: int) -> int:
        """Resolution of a level over that of the next coarser target (4x4 below the last)."""
        coarser = self.levels[level + 1].resolution if level + 1 < len(self.levels) else 4
        return self.levels[level].resolution // coarser

    def input_channels(self, level: int) -> int:
        """Channels of what decoder `level` receives: the next coarser target, or the 4x4 start."""
        return self.levels[level + 1].channels if level + 1 < len(self.levels) else self.end.width

    @model_validator(mode="after")
    def _check(self) -> "HFlowConfig":
        if self.levels[0].channels != 3 or self.levels[0].noise is not None or self.levels[0].skip_channels:
            raise ValueError("levels.0 is the image: 3 channels, no noise, no skip")
        if self.levels[-1].resolution != 8:
            raise ValueError(f"the last level must be 8x8, not {self.levels[-1].resolution}")
        for finer, coarser in zip(self.levels, self.levels[1:], strict=False):
            if finer.resolution not in (2 * coarser.resolution, 4 * coarser.resolution):
                raise ValueError(
                    f"neighbour resolutions must differ by 2 or 4, not {finer.resolution} and {coarser.resolution}"
                )
            if coarser.skip_channels < 1:
                raise ValueError("every level but the first needs skip_channels of at least 1")
        if self.uses_style and not self.maps_style and self.style_channels != self.end.width:
            raise ValueError("with the whole end vector hidden from style, style_channels must equal the end width")
        return self


def unet_widths(width: int, growth: float, depth: int) -> list[int]:
    """Channel counts of a UNet from full resolution down: floor(width * growth^i)."""
    return [math.floor(width * growth**i) for i in range(depth + 1)]
