"""The network (spec 3): a U-Net that says, of a blurred image and its level, what the next sharper one adds to it.

Its only use of the level is a bias in every residual block. `level_biases` computes these, side by side in one row,
and `walk` takes them, so that a table of rows (spec 10.2) can stand in for all that computes them.

Modules are made in the order of the published parameters, because published averages of them are lists without names.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.models.ihdm.config import GROUPS, IHDMConfig

__all__ = ["Attention", "Element", "ResidualBlock", "UNet", "sinusoid"]

_SLOWEST = 10_000.0


def sinusoid(level: Tensor, length: int) -> Tensor:
    """Levels `[B]`, whole or real, as cosines and then sines of falling frequencies, float64 `[B, length]`."""
    half = length // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float64, device=level.device) * (-math.log(_SLOWEST) / half))
    angle = level.double()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def _zeroed(module: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip; the level's bias stands between them."""

    def __init__(self, c_in: int, c_out: int, emb: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.level: nn.Linear | None = nn.Linear(emb, c_out)
        self.norm2 = nn.GroupNorm(GROUPS, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None
        self.width = c_out

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`[B, c_in, H, W]` and the level's bias, `[c_out]` or `[B, c_out]`, to `[B, c_out, H, W]`."""
        h: Tensor = self.conv1(F.silu(self.norm1(x))) + bias[..., None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    """One head as wide as the channels; every position looks at every position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).unsqueeze(1).chunk(3, -1)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Element(nn.Module):
    """A step of the walk: a residual block, then attention, then a change of side, as far as there are any."""

    def __init__(
        self, block: ResidualBlock | None = None, attention: Attention | None = None, conv: nn.Conv2d | None = None
    ) -> None:
        super().__init__()
        self.block, self.attention, self.conv = block, attention, conv
        self.doubles = conv is not None and block is not None

    def forward(self, h: Tensor, bias: Tensor | None) -> Tensor:
        """`bias` is the block's."""
        if self.block is not None:
            h = self.block(h, bias)
        if self.attention is not None:
            h = self.attention(h)
        if self.conv is not None:
            h = self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest") if self.doubles else h)
        return h


class UNet(nn.Module):
    """See the file's first lines. A fresh one adds nothing: what ends each of its branches begins at zero."""

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        self.config = config
        emb = 4 * config.base_width
        self.embedding: nn.Sequential | None = nn.Sequential(
            nn.Linear(config.base_width, emb), nn.SiLU(), nn.Linear(emb, emb)
        )

        def block(c_in: int, c_out: int) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, emb, config.dropout)

        def attention(stage: int, width: int) -> Attention | None:
            return Attention(width) if stage in config.attention else None

        stages = range(len(config.widths))
        width = config.width(0)
        down = [Element(conv=nn.Conv2d(config.channels, width, 3, padding=1))]
        pushed = [width]
        for stage in stages:
            for _ in range(config.blocks):
                down.append(Element(block(width, config.width(stage)), attention(stage, config.width(stage))))
                width = config.width(stage)
                pushed.append(width)
            if stage < stages[-1]:
                down.append(Element(conv=nn.Conv2d(width, width, 3, stride=2, padding=1)))
                pushed.append(width)
        self.down = nn.ModuleList(down)
        self.middle = nn.ModuleList([Element(block(width, width), Attention(width)), Element(block(width, width))])
        up = []
        for stage in reversed(stages):
            for index in range(config.blocks + 1):
                made = block(width + pushed.pop(), width := config.width(stage))
                attends = attention(stage, width)
                last = index == config.blocks and stage > 0
                up.append(Element(made, attends, nn.Conv2d(width, width, 3, padding=1) if last else None))
        self.up = nn.ModuleList(up)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.head = _zeroed(nn.Conv2d(width, config.channels, 3, padding=1))

    def elements(self) -> list[Element]:
        """In the order of the walk."""
        parts = cast("tuple[list[Element], ...]", (self.down, self.middle, self.up))
        return [element for part in parts for element in part]

    def blocks(self) -> list[ResidualBlock]:
        """In the order of the walk, which is that of their biases in a row."""
        return [element.block for element in self.elements() if element.block is not None]

    def embed(self, level: Tensor) -> Tensor:
        """Levels `[B]`, whole or real, to what the blocks make their biases of, `[B, 4 base_width]`."""
        assert self.embedding is not None, "a folded network takes its biases from a table"
        found: Tensor = self.embedding(sinusoid(level, self.config.base_width).to(self.head.weight.dtype))
        return found

    def level_biases(self, level: Tensor) -> Tensor:
        """Levels `[B]` to the biases of all blocks side by side, `[B, W]`."""
        active = F.silu(self.embed(level))
        return torch.cat([block.level(active) for block in self.blocks() if block.level is not None], 1)

    def walk(self, u: Tensor, biases: Tensor) -> Tensor:
        """Images `[B, C, R, R]` and biases, `[W]` or `[B, W]`, to what the next sharper level adds."""
        rows = iter(torch.split(biases, [block.width for block in self.blocks()], -1))
        pushed: list[Tensor] = []
        h = u
        for part in (self.down, self.middle, self.up):
            for element in part:
                if part is self.up:
                    h = torch.cat([h, pushed.pop()], 1)
                h = element(h, None if element.block is None else next(rows))
                if part is self.down:
                    pushed.append(h)
        found: Tensor = self.head(F.silu(self.norm(h)))
        return found

    def forward(self, u: Tensor, level: Tensor) -> Tensor:
        """Images `[B, C, R, R]` and their levels `[B]` to what the next sharper level adds."""
        return self.walk(u, self.level_biases(level))
