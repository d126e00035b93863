"""The image, or a part of it, at other pixels than those of training (spec section 16).

Stages before the last one that has an embedding stay on their grids. That one and what follows it compute at the pixels
that are asked for, whose waves are those of their own place; whatever is a map is read there: between its pixels as
the variant enlarges, or in the pixel that a place is in. So a pixel of the image itself keeps its colour, and a part
is a part of the whole. Spreads, which are of the whole image, are those of the grid that was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hflow_rt.models.inrgan.config import INRGANConfig
    from hflow_rt.models.inrgan.network import Synthesis

__all__ = ["Pixels", "Reader", "first_seen", "seen"]

_SAME = 1e-9  # pixels: what a place may lack by rounding to be in the next one


class Reader(nn.Module):
    """Reads maps at places between their pixels."""

    def __init__(self, x: Tensor, y: Tensor, nearest: bool) -> None:
        """x, y: places along both axes in pixels of a map, `[N]` float64 and not below 0."""
        super().__init__()
        self.nearest = nearest
        for name, places in (("x", x), ("y", y)):
            low = (places + _SAME).floor()
            self.register_buffer(f"{name}_pixel", low.long(), persistent=False)
            self.register_buffer(f"{name}_share", (places - low).clamp(min=0), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """`[B, C, n, n]` to `[B, C, N, N]`."""
        for axis, name in ((2, "y"), (3, "x")):
            pixel, share = self.get_buffer(f"{name}_pixel"), self.get_buffer(f"{name}_share")
            low = image.index_select(axis, pixel)
            if not self.nearest:
                high = image.index_select(axis, (pixel + 1).clamp(max=image.shape[axis] - 1))
                low = low + (share[:, None] if axis == 2 else share).to(image) * (high - low)
            image = low
        return image


class Pixels:
    """Where the pixels of a view are; x, y: `[N]` float64 in pixels of the trained image, from its top left."""

    def __init__(self, config: INRGANConfig) -> None:
        assert config.view is not None
        self.side, self.nearest, count = config.resolution, config.upsampling == "nearest", config.view.resolution
        left, top, right, bottom = config.view.region
        step = torch.arange(count, dtype=torch.float64) * self.side / count
        self.x, self.y = (self.side * start + step * (end - start) for start, end in ((left, right), (top, bottom)))

    def reader(self, side: int) -> Reader:
        """Of maps of `side` that cover the whole image."""
        scale = side / self.side if self.nearest else (side - 1) / (self.side - 1)
        last = side - _SAME if self.nearest else side - 1
        return Reader((self.x * scale).clamp(max=last), (self.y * scale).clamp(max=last), self.nearest)


def first_seen(synthesis: Synthesis) -> int:
    """The first stage that computes at the pixels of a view."""
    return max(index for index, stage in enumerate(synthesis.own_stages()) if stage.embedding is not None)


def seen(synthesis: Synthesis, config: INRGANConfig, w: Tensor) -> Tensor:
    """One w a slot `[B, S, W]` to the view of the image, `[B, channels, N, N]`, nominally in [-1, 1]."""
    pixels, first = Pixels(config), first_seen(synthesis)
    x = image = trained = None
    slots, slot = w.unbind(1), 0
    for index, stage in enumerate(synthesis.own_stages()):
        own, last = slots[slot : slot + len(stage.layers)], slots[slot + len(stage.layers)]
        slot += len(stage.layers)
        if index < first:
            x = trained = stage.forward(x, own)
            image = stage.summed(image, stage.colours.forward(x, last))
            continue
        trained, spreads = stage.layered(stage.entered(trained, len(w)), own)
        x, _ = stage.layered(stage.entered(x, len(w), pixels), own, spreads)
        image = stage.summed(image, stage.colours.forward(x, last), pixels)
    assert image is not None
    return image
