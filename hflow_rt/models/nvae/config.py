"""Settings of an NVAE model (spec sections 1, 5 and 7). Scale 0 is the one of the finest latents; z_1 is group 0."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hflow_rt.models.registry import ModelConfig

__all__ = ["EXPANSION_AFTER", "EXPANSION_TOWER", "NVAEConfig", "Output", "halved_groups"]

EXPANSION_TOWER, EXPANSION_AFTER = 6, 3  # of channels inside cells of the decoder tower, and of those behind it
_LARGEST_SIDE = 4096

Output = Literal["mixture", "bernoulli", "normal"]
_Width = Annotated[int, Field(ge=1, le=1 << 12)]
_Cells = Annotated[int, Field(ge=1, le=64)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(gt=0, le=1e6)]


class NVAEConfig(ModelConfig):
    """Latents of scale s have the side `canvas / 2^(blocks + s)`, in `groups[s]` groups of `latent_channels`."""

    resolution: Annotated[int, Field(ge=4, le=_LARGEST_SIDE)]
    bits: Annotated[int, Field(ge=1, le=8)] = Field(default=8, description="of the data; fewer than 8 drop the lowest")
    padding: Annotated[int, Field(ge=0, le=64)] = Field(default=0, description="pixels of 0 on each side")

    output: Output = Field(default="mixture", description="distribution of the pixels")
    mixtures: Annotated[int, Field(ge=2, le=100)] = Field(default=10, description="logistics of a mixture")
    likelihood: Literal["exact", "published"] = Field(
        default="exact",
        description="published: the top level begins at 0.99 of [-1, 1], and masses below 1e-5 are approximated",
    )

    groups: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        min_length=1, max_length=10, description="groups of latents of every scale, finest first"
    )
    latent_channels: Annotated[int, Field(ge=1, le=1024)] = 20
    encoder_width: _Width = Field(description="channels at the full side")
    decoder_width: _Width = Field(description="channels at the full side")
    blocks: Annotated[int, Field(ge=0, le=8)] = Field(description="halvings before the finest latents")
    block_cells: _Cells = Field(default=2, description="cells of such a block in the encoder")
    decoder_block_cells: _Cells = Field(default=2, description="cells of such a block in the decoder")
    encoder_cells: _Cells = Field(default=2, description="cells of a group")
    decoder_cells: _Cells = Field(default=2, description="cells of a group")
    flows: Annotated[int, Field(ge=0, le=16)] = Field(default=0, description="of the posterior of a group")
    squeeze_excite: bool = True
    residual_posterior: bool = Field(default=True, description="the posterior is told relative to the prior")

    recompute: bool = Field(
        default=False, description="cells' activations in training, when they are needed again, instead of keeping them"
    )
    kl_warmup: _Share = Field(default=0.3, description="share of the run over which the weight of the KL grows to 1")
    kl_constant: _Share = Field(default=1e-4, description="share of the run before that")
    kl_floor: Annotated[float, Field(gt=0, le=1)] = Field(default=1e-4, description="smallest weight of the KL")
    weight_penalty: _Penalty = Field(default=1e-2, description="weight of spectral and batch-norm regularisation")
    weight_penalty_start: _Penalty | None = Field(
        default=None, description="that weight while the KL has none, from which it moves to weight_penalty"
    )

    @property
    def canvas(self) -> int:
        """Side of the padded image, on which the network works."""
        return self.resolution + 2 * self.padding

    def side(self, scale: int) -> int:
        """Of the latents."""
        return self.canvas >> (self.blocks + scale)

    def encoder_channels(self, scale: int) -> int:
        """Of the encoder tower."""
        return self.encoder_width << (self.blocks + scale)

    def decoder_channels(self, scale: int) -> int:
        """Of the decoder tower."""
        return self.decoder_width << (self.blocks + scale)

    @property
    def group_scales(self) -> tuple[int, ...]:
        """The scale of every group, top first."""
        scales = range(len(self.groups))
        return tuple(scale for scale in reversed(scales) for _ in range(self.groups[scale]))

    def group_shape(self, group: int) -> tuple[int, int, int]:
        """Of one group's latents."""
        side = self.side(self.group_scales[group])
        return self.latent_channels, side, side

    def packed_shapes(self, name: str) -> dict[str, tuple[int, int, int]]:
        """All groups of a scale in one tensor, top first along channels: `NAME2`, `NAME1`, `NAME0`, coarse to fine."""
        return {
            f"{name}{scale}": (self.groups[scale] * self.latent_channels, self.side(scale), self.side(scale))
            for scale in reversed(range(len(self.groups)))
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, R, R)`, without padding."""
        return self.channels, self.resolution, self.resolution

    @property
    def head_channels(self) -> int:
        """Parameters of the distribution of a pixel."""
        if self.output == "bernoulli":
            return self.channels
        if self.output == "normal":
            return 2 * self.channels
        return (10 if self.channels == 3 else 3) * self.mixtures

    @model_validator(mode="after")
    def _check(self) -> "NVAEConfig":
        halvings = 1 << (self.blocks + len(self.groups) - 1)
        if self.canvas % halvings:
            raise ValueError(
                f"resolution plus twice padding must be divisible by {halvings}, for {self.blocks} blocks and "
                f"{len(self.groups)} scales, not {self.canvas}"
            )
        if (self.output == "bernoulli") != (self.bits == 1):
            raise ValueError(f"output bernoulli and bits 1 need each other; found {self.output} and {self.bits}")
        if self.output == "bernoulli" and self.channels != 1:
            raise ValueError("output bernoulli is of grey images; set channels to 1")
        return self


def halved_groups(groups: int, scales: int, fewest: int = 1) -> tuple[int, ...]:
    """The published adaptive numbers of groups: half as many at every coarser scale, but not fewer than `fewest`."""
    found = [groups]
    for _ in range(scales - 1):
        found.append(max(fewest, found[-1] // 2))
    return tuple(found)
