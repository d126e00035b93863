"""The generator of INR-GAN: z to w, and w to colours at every pixel of a grid (spec sections 2.1 and 3).

No layer looks at neighbouring pixels; each stage beyond the input grid doubles the grid and adds what its pixels know
of their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from hflow_rt.kernels.split_act import enlarged
from hflow_rt.layers.equalized import EqualizedLinear
from hflow_rt.models.inrgan.config import FIRST_STAGE, INRGANConfig
from hflow_rt.models.inrgan.layers import (
    LR_SCALE,
    CoordinateEmbedding,
    ModulatedLayer,
    ToColours,
    normalized,
    phi,
    spread,
)
from hflow_rt.models.inrgan.view import Pixels

__all__ = ["Mapping", "Stage", "Synthesis", "shortening"]


def shortening(slots: Tensor, psi: Tensor, cutoff: Tensor) -> Tensor:
    """How far truncation goes to the centre: 1 - psi in slots before `cutoff`, then not at all.

    slots: `[N]`, of `[B, N]` numbers. psi, cutoff: `[B]`; a cutoff of as many as there are slots means all.
    """
    return (1 - psi[:, None]) * (slots < cutoff[:, None]).to(slots.dtype)


class Mapping(nn.Module):
    """z, and the labels of a conditional model, to w."""

    def __init__(self, z_dim: int, w_dim: int, labels: int, layers: int) -> None:
        """z_dim 0: labels alone are mapped."""
        super().__init__()
        self.embed = EqualizedLinear(labels, w_dim) if labels else None
        first = z_dim + (w_dim if labels else 0)
        sizes = [first] + [w_dim] * layers
        self.layers = nn.ModuleList(EqualizedLinear(c_in, c_out, lr_scale=LR_SCALE) for c_in, c_out in pairwise(sizes))

    def forward(self, z: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """`[B, Z]` and `[B, options]` to `[B, W]`."""
        parts = [] if z is None else [normalized(z)]
        if self.embed is not None:
            assert labels is not None
            parts.append(normalized(self.embed(labels)))
        x = torch.cat(parts, 1)
        for layer in self.layers:
            x = phi(layer(x))
        return x


class Stage(nn.Module):
    """Layers at one width, and a map to colours."""

    def __init__(self, config: INRGANConfig, stage: int) -> None:
        super().__init__()
        side = config.grid(stage)
        self.is_first = stage == FIRST_STAGE
        self.doubles = side > config.input_side
        self.upsampling = config.upsampling
        embeds = self.is_first or self.doubles
        self.embedding = CoordinateEmbedding(config.embeddings[side], side) if embeds else None
        c_in = config.embeddings[side].channels(side) if embeds else 0
        if not self.is_first:
            c_in += config.width(stage // 2)
        c_out = config.width(stage)
        self.layers = nn.ModuleList(
            ModulatedLayer(c_out if index else c_in, c_out, config.w_dim, config.rank)
            for index in range(config.layers(stage))
        )
        self.colours = ToColours(c_out, config.channels, config.w_dim)

    def own_layers(self) -> list[ModulatedLayer]:
        """Its layers, the map to colours aside."""
        return cast("list[ModulatedLayer]", list(self.layers))

    def enlarge(self, x: Tensor, pixels: Pixels | None = None) -> Tensor:
        """Features or colours of the stage before on this stage's grid, or at the pixels of a view."""
        if not self.doubles:
            return x
        return enlarged(x, self.upsampling) if pixels is None else pixels.reader(x.shape[-1]).to(x.device)(x)

    def entered(self, x: Tensor | None, count: int, pixels: Pixels | None = None) -> Tensor:
        """What its first layer takes, `[B, C_in, n, n]`: features of the stage before, if there is one, and places."""
        parts = [] if x is None else [self.enlarge(x, pixels)]
        if self.embedding is not None:
            parts.append(self.embedding(pixels).expand(count, -1, -1, -1))
        return torch.cat(parts, 1)

    def layered(
        self, x: Tensor, w: Sequence[Tensor], spreads: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Through the layers: features, and by layer after the first the spreads they had, or had to have."""
        used: list[Tensor] = []
        for index, (layer, own) in enumerate(zip(self.own_layers(), w, strict=True)):
            if index and self.upsampling == "bilinear":
                used.append(spread(x) if spreads is None else spreads[index - 1])
                x = x / used[-1]
            x = layer(x, own)
        return x, used

    def summed(self, image: Tensor | None, colours: Tensor, pixels: Pixels | None = None) -> Tensor:
        """The image of the stage before with the colours of this one."""
        return colours if image is None else self.enlarge(image, pixels) + colours

    def forward(self, x: Tensor | None, w: Sequence[Tensor]) -> Tensor:
        """Features of the stage before, if there is one, to `[B, C, n, n]`. w: `[B, W]` of each layer."""
        return self.layered(self.entered(x, len(w[0])), w)[0]


class Synthesis(nn.Module):
    """One w a slot to an image."""

    def __init__(self, config: INRGANConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(config, stage) for stage in config.stages)

    def own_stages(self) -> list[Stage]:
        """The smallest first."""
        return cast("list[Stage]", list(self.stages))

    def walk(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """By stage: its features, and the image so far. w: `[B, S, W]`."""
        x: Tensor | None = None
        image: Tensor | None = None
        slots, slot = w.unbind(1), 0
        for stage in self.own_stages():
            end = slot + len(stage.layers)
            x = stage.forward(x, slots[slot:end])
            colours = stage.colours.forward(x, slots[end])  # the slot of the next stage's first layer
            image = stage.summed(image, colours)
            slot = end
            yield x, image

    def forward(self, w: Tensor) -> Tensor:
        """`[B, S, W]` to `[B, channels, R, R]`, nominally in [-1, 1]."""
        for _, image in self.walk(w):  # noqa: B007 - the last is used
            pass
        return image
