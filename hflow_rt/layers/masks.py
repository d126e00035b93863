"""Which positions a coupling net sees and which it transforms (hflow spec 2.3).

`seen` is 1 where the net sees the input; everything else is transformed.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from hflow_rt.kernels.coupling import Region

__all__ = ["PERIODS", "Split", "seen_mask", "split_steps", "transformed"]

Split = Literal["channels", "spatial", "blocks", "lblocks", "hblocks", "vhalfs", "hhalfs"]

# side of the smallest tile that holds both colours equally
PERIODS: dict[str, int] = {"spatial": 2, "blocks": 4, "lblocks": 8, "hblocks": 16, "vhalfs": 2, "hhalfs": 2}


def split_steps(name: str, steps: int) -> list[Split]:
    """Expand a composite name to one split a step, in forward order. Raises ValueError for an unknown name or count."""
    composites = ("blocks-channels", "hblocks-lblocks-blocks-channels")
    parts = name.split("-")
    if (len(parts) > 1 and name not in composites) or any(part not in get_args(Split) for part in parts):
        raise ValueError(f"unknown split '{name}'; known: {', '.join((*get_args(Split), *composites))}")
    if steps % len(parts):
        raise ValueError(f"split '{name}' needs a number of steps divisible by {len(parts)}, not {steps}")
    return [part for part in parts for _ in range(steps // len(parts))]  # type: ignore[misc]


def seen_mask(split: Split, channels: int, resolution: int, step: int) -> Tensor:
    """0/1 mask that broadcasts to `[B, C, R, R]` (`[B, C]` for resolution 1).

    Every split but `channels` swaps the two sides on steps of even index, so that neighbours alternate.
    """
    if split == "channels":
        seen = (torch.arange(channels) < channels // 2).float()
        return seen.view(1, -1) if resolution == 1 else seen.view(1, -1, 1, 1)
    index = torch.arange(resolution)
    if split in ("vhalfs", "hhalfs"):
        half = index >= resolution // 2
        rows, columns = (torch.zeros_like(half), half) if split == "vhalfs" else (half, torch.zeros_like(half))
        seen = rows[:, None] | columns[None, :]
    elif split == "spatial":
        seen = (index[:, None] + index[None, :]) % 2 == 1
    else:
        cell = index // (PERIODS[split] // 2)
        seen = (cell[:, None] + cell[None, :]) % 2 == 0
    if step % 2 == 0:
        seen = ~seen
    return seen.float().view(1, 1, resolution, resolution)


def transformed(split: Split, channels: int, resolution: int, step: int) -> Region:
    """Where `seen_mask` is 0, for kernels to tell by index."""
    if split == "channels":
        return Region(channels // 2, channels)
    if split in ("vhalfs", "hhalfs"):
        whole, half = resolution, max(1, resolution // 2)
        height, width = (whole, half) if split == "vhalfs" else (half, whole)
        return Region(0, channels, height, width, (step + 1) % 2)
    cell = PERIODS[split] // 2
    return Region(0, channels, cell, cell, (step + (split == "spatial")) % 2)
