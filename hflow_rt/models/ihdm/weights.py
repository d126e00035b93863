"""Published names of tensors and ours (spec 3.6), and what they tell of the network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.source import shown
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.network import UNet

__all__ = ["from_original", "infer_network", "our_name", "parameter_order"]

_PARTS = {
    r"time_embed": "embedding",
    r"input_blocks\.0\.0": "down.0.conv",
    r"input_blocks\.(\d+)\.0\.op": r"down.\1.conv",
    r"input_blocks\.(\d+)\.0": r"down.\1.block",
    r"input_blocks\.(\d+)\.1": r"down.\1.attention",
    r"middle_block\.0": "middle.0.block",
    r"middle_block\.1": "middle.0.attention",
    r"middle_block\.2": "middle.1.block",
    r"output_blocks\.(\d+)\.[12]\.conv": r"up.\1.conv",  # after attention where there is any
    r"output_blocks\.(\d+)\.0": r"up.\1.block",
    r"output_blocks\.(\d+)\.1": r"up.\1.attention",
    r"out\.0": "norm",
    r"out\.2": "head",
}
_LEAVES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "level",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
    "proj_out": "out",
}
_MOST_ELEMENTS = 1000  # of the walk; the largest published network has 51


def our_name(name: str) -> str:
    """A published tensor's name, without `module.`, as a parameter of `UNet`; an unknown name keeps its own."""
    for pattern, ours in _PARTS.items():
        if match := re.match(rf"{pattern}\.", name):
            module, _, leaf = name[match.end() :].rpartition(".")
            return ".".join(part for part in (match.expand(ours), _LEAVES.get(module, module), leaf) if part)
    return name


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors, without `module.`, under the names of `IHDM`; projections of attention lose a last 1."""
    return {
        f"network.{our_name(name)}": tensor.squeeze(-1) if _is_projection(name, tensor.dim()) else tensor
        for name, tensor in state.items()
    }


def _is_projection(name: str, dimensions: int) -> bool:
    return dimensions == 3 and name.endswith((".qkv.weight", ".proj_out.weight"))


def parameter_order(config: IHDMConfig, names: Sequence[str], source: str) -> list[str]:
    """Published names in the order in which the original makes them, which a list of tensors without names keeps.

    Raises `CheckpointError` if they are not those of the network that `config` describes.
    """
    theirs = {our_name(name): name for name in names}
    with torch.device("meta"):
        made = [name for name, _ in UNet(config).named_parameters()]
    if missing := [name for name in made if name not in theirs]:
        raise CheckpointError(f"{source} lacks {missing[0]} and {len(missing) - 1} others; give a whole file")
    if len(made) != len(names):
        strange = next(name for name in names if our_name(name) not in made)
        raise CheckpointError(
            f"{source} holds {shown(strange)}, which has no place in the network; give an intact file"
        )
    return [theirs[name] for name in made]


def infer_network(shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, Any]:
    """The settings of the network that published names and shapes tell. Raises `CheckpointError`."""

    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise CheckpointError(f"{source} lacks {name} of a published IHDM network; give a whole file")
        return shapes[name][axis]

    base = size("time_embed.0.weight", 1)
    widths: list[float] = []
    blocks, attention = [0], list[int]()
    indices = {int(m[1]) for name in shapes if (m := re.match(r"input_blocks\.(\d{1,4})\.", name))}
    if len(indices) > _MOST_ELEMENTS:
        raise CheckpointError(f"{source}: a network must have at most {_MOST_ELEMENTS:,} parts, not {len(indices):,}")
    for index in range(1, len(indices)):
        if f"input_blocks.{index}.0.op.weight" in shapes:
            blocks.append(0)
            continue
        blocks[-1] += 1
        if len(widths) < len(blocks):
            widths.append(size(f"input_blocks.{index}.0.in_layers.2.weight", 0) / max(base, 1))
        if f"input_blocks.{index}.1.qkv.weight" in shapes and len(blocks) - 1 not in attention:
            attention.append(len(blocks) - 1)
    if len(set(blocks)) != 1 or not all(width == int(width) for width in widths):
        raise CheckpointError(
            f"{source}: every stage must have as many blocks and whole multiples of {base} channels, "
            f"not {blocks} blocks and {widths} multiples; give an intact file"
        )
    return {
        "channels": size("input_blocks.0.0.weight", 1),
        "base_width": base,
        "widths": tuple(map(int, widths)),
        "blocks": blocks[0],
        "attention": tuple(attention),
    }
