"""Published names of tensors and ours (spec sections 3 and 5)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hflow_rt.models.inrgan.config import FIRST_STAGE, INRGANConfig

__all__ = ["DROPPED", "discriminator_from_original", "from_original"]

DROPPED = "resample_filter"  # constants of kernels, which follow from the architecture
_WAVES = re.compile(r"(.*)\.(log|random)_basis")
_LEAVES = (
    (r"^mapping\.w_avg$", "w_avg"),
    (r"mapping\.fc(\d+)\.", r"mapping.layers.\1."),
    (r"\.(input\.input\.)?coord_fuser\.const_embs$", r".embedding.const"),
    (r"\.(input\.input\.)?coord_fuser\.", r".embedding."),
    (r"\.torgb\.", r".colours."),
)


def _stage_index(side: str) -> int:
    return int(side).bit_length() - FIRST_STAGE.bit_length()


def _layer(match: re.Match[str]) -> str:
    """`b8.conv1` is the second layer of its stage, but `b4.conv1` the first; extra ones follow."""
    side, conv, extra = match.groups()
    first = 1 if int(side) == FIRST_STAGE else 0
    index = int(conv) if extra is None else 2 + int(extra)
    return f"b{side}.layers.{index - first}."


def our_name(name: str) -> str:
    """A published name of the generator as ours; an unknown one keeps its own."""
    name = re.sub(r"b(\d{1,5})\.(?:conv(\d)|extra_convs\.(\d{1,3}))\.", _layer, name)
    for pattern, ours in _LEAVES:
        name = re.sub(pattern, ours, name)
    return re.sub(r"^synthesis\.b(\d{1,5})\.", lambda match: f"synthesis.stages.{_stage_index(match[1])}.", name)


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors of a generator under the names of `INRGAN`: 1x1 kernels lose their sides, waves are joined."""
    found: dict[str, Tensor] = {}
    waves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.rpartition(".")[2] == DROPPED:
            continue
        if match := _WAVES.fullmatch(our_name(name)):
            waves.setdefault(match[1], {})[match[2]] = tensor
        else:
            kernel = tensor.dim() == 4 and name.endswith(".weight") and tensor.shape[2:] == (1, 1)
            found[our_name(name)] = tensor[:, :, 0, 0] if kernel else tensor
    for owner, parts in waves.items():
        found[f"{owner}.waves"] = torch.cat([parts[kind] for kind in ("log", "random") if kind in parts])
    return found


def discriminator_from_original(config: INRGANConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors of a discriminator under the names of `Discriminator`."""
    blocks = {stage: index for index, stage in enumerate(config.stages[:0:-1])}

    def named(name: str) -> str:
        name = re.sub(r"^mapping\.fc(\d+)\.", r"mapping.layers.\1.", name.removeprefix(f"b{FIRST_STAGE}."))
        name = re.sub(r"^b\d+\.fromrgb\.", "from_colours.", name)
        return re.sub(r"^b(\d+)\.", lambda match: f"blocks.{blocks[int(match[1])]}.", name)

    return {named(name): tensor for name, tensor in state.items() if name.rpartition(".")[2] != DROPPED}
