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

from hflow_rt.kernels.dispatch import takes
from hflow_rt.kernels.group_norm import group_norm_silu
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


def normed(x: Tensor, norm: nn.GroupNorm, skip: Tensor | None = None, level: Tensor | None = None) -> Tensor:
    """SiLU of `norm` of `group_norm_silu`'s other arguments."""
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, skip=skip, level=level)


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

    def forward(self, x: Tensor, bias: Tensor, beside: Tensor | None = None) -> Tensor:
        """`[B, c_in, H, W]` and the level's bias, `[c_out]` or `[B, c_out]`, to `[B, c_out, H, W]`.

        beside: the last of the input's channels, where `x` are only the first.
        """
        if beside is not None and not takes(x):
            x, beside = torch.cat([x, beside], 1), None
        h: Tensor = self.conv1(normed(x, self.norm1, skip=beside))
        h = self.conv2(self.dropout(normed(h, self.norm2, level=bias)))
        return h + self._shortcut(x, beside)

    def _shortcut(self, x: Tensor, beside: Tensor | None) -> Tensor:
        if self.skip is None:
            return x
        if beside is None:
            whole: Tensor = self.skip(x)
            return whole
        first, last = torch.split(self.skip.weight, [x.shape[1], beside.shape[1]], 1)
        return F.conv2d(x, first, self.skip.bias) + F.conv2d(beside, last)


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

    def forward(self, h: Tensor, bias: Tensor | None, beside: Tensor | None = None) -> Tensor:
        """`bias` and `beside` are the block's."""
        if self.block is not None:
            h = self.block(h, bias, beside)
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
        inner = config.channels * config.patch**2
        seen = inner * (2 if config.linear_skip else 1)
        down = [Element(conv=nn.Conv2d(seen, width, 3, padding=1))]
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
        self.head = _zeroed(nn.Conv2d(width, inner, 3, padding=1))

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
        patch = self.config.patch
        h = u if patch == 1 else F.pixel_unshuffle(u, patch)
        for part in (self.down, self.middle, self.up):
            for element in part:
                beside = pushed.pop() if part is self.up else None
                h = element(h, None if element.block is None else next(rows), beside)
                if part is self.down:
                    pushed.append(h)
        found: Tensor = self.head(normed(h, self.norm))
        return found if patch == 1 else F.pixel_shuffle(found, patch)

    def forward(self, u: Tensor, level: Tensor) -> Tensor:
        """Images `[B, C, R, R]` and their levels `[B]` to what the next sharper level adds."""
        return self.walk(u, self.level_biases(level))
