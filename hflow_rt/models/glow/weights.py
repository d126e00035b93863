"""Names of published tensors and ours, in both directions, for two layouts of PyTorch implementations.

"blocks": `blocks.0.flows.1...`, the style of spec 11's first column. "layers": `flow.layers.3...`, squeezes and splits
counted with the steps, the style of the paper. They differ in sign (theirs is image to latents), in shapes of
per-channel tensors and in the order of a subnet's output channels.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.source import shown
from hflow_rt.models.glow.config import GlowConfig

__all__ = ["Layout", "Renaming", "from_original", "ignored_kind", "layout_of", "renaming"]

Layout = Literal["blocks", "layers"]

# recomputed, or of no effect on any result
_IGNORED = {
    r"blocks\.\d+\.flows\.\d+\.invconv\.(u_mask|l_mask|l_eye)": "mask",
    r"blocks\.\d+\.flows\.\d+\.coupling\.nets\.1\..*": "tensor of subnets never used",
    r"learn_top_fn\.conv\.weight": "weight that only sees zeros",
    r"prior_h": "tensor of zeros",
}
_HEADS = {
    "project_ycond.": "top.label.",
    "project_class.": "classifier.",
    "learn_top_fn.": "top.",
}
_STEP = {
    "actnorm": "actnorm",
    "invconv": "mixing",
    "shuffle": "mixing",
    "reverse": "mixing",
    "block.0": "coupling.net.conv1",
    "block.0.conv": "coupling.net.conv1",
    "block.0.actnorm": "coupling.net.conv1.norm",
    "block.2": "coupling.net.conv2",
    "block.2.conv": "coupling.net.conv2",
    "block.2.actnorm": "coupling.net.conv2.norm",
    "block.4": "coupling.net.out",
    "block.4.conv": "coupling.net.out",
}
_LEAVES = {
    "w_l": "lower",
    "w_u": "upper",
    "w_s": "log_diagonal",
    "s_sign": "sign",
    "w_p": "order",
    "log_s": "log_diagonal",
    "sign_s": "sign",
    "p": "order",
    "indices": "order",
    "scale": "log_gain",
    "logs": "log_gain",
}
_NORM_LEAVES = {"bias": "shift", "logs": "log_scale"}


@dataclass(frozen=True)
class Renaming:
    """Where a published tensor belongs: `name` is ours; ours is `sign` times theirs, channel i being `order[i]`."""

    name: str
    sign: int = 1
    order: Tensor | None = None

    def ours(self, theirs: Tensor) -> Tensor:
        """Theirs as we keep it: per-channel tensors are flat, a permutation may have been a matrix."""
        if self.name.endswith("mixing.order"):
            return theirs.argmax(1) if theirs.dim() == 2 else theirs.to(torch.int64)
        value = theirs * self.sign
        if _is_per_channel(self.name):
            value = value.flatten()
        if self.order is None or value.shape[:1] != self.order.shape:  # a wrong shape, which loading reports
            return value
        return value[self.order]

    def theirs(self, ours: Tensor) -> Tensor:
        """The inverse of `ours` up to shape; of gradients, too, because it only permutes and changes signs."""
        value = ours * self.sign
        return value if self.order is None else value[torch.argsort(self.order)]


def layout_of(names: Mapping[str, object], source: str = "the file") -> Layout:
    """Which layout these tensor names are of. Raises `CheckpointError`."""
    if any(name.startswith("blocks.0.flows.0.") for name in names):
        return "blocks"
    if any(name.startswith("flow.layers.1.") for name in names):
        return "layers"
    raise CheckpointError(
        f"{source} must name its tensors blocks.0.flows.0... or flow.layers.1..., as published Glow models do; "
        f"found {shown(next(iter(names), 'none'))}"
    )


def ignored_kind(name: str) -> str | None:
    """What a published tensor is that we do not need, such as "mask"; None for one that we need."""
    return next((kind for pattern, kind in _IGNORED.items() if re.fullmatch(pattern, name)), None)


def from_original(config: GlowConfig, state: Mapping[str, Tensor], source: str = "the file") -> dict[str, Tensor]:
    """The published tensors under our names; an unknown name keeps its own, so that loading reports it.

    Raises `CheckpointError`, which begins with `source`, for two names of one tensor and for what is no permutation.
    """
    layout = layout_of(state, source)
    result: dict[str, Tensor] = {"initialized": torch.ones((), dtype=torch.uint8)}
    for name, tensor in state.items():
        if name == "prior_h" and bool(tensor.any()):
            raise CheckpointError(f"{source}: prior_h must be zeros because it is no parameter; give an intact file")
        if ignored_kind(name) is not None:
            continue
        where = renaming(config, layout, name)
        if where.name in result:
            raise CheckpointError(f"{source} holds {shown(where.name)} under two names; give a file with one of them")
        result[where.name] = where.ours(tensor)
        if where.name.endswith("mixing.order"):
            _check_permutation(result[where.name], tensor, f"{source}: {shown(name)}")
    if config.permutation == "reverse":
        for level in range(config.levels):
            order = torch.arange(config.width(level) - 1, -1, -1)
            names = (f"levels.{level}.chain.steps.{step}.mixing.order" for step in range(config.steps))
            result |= {name: order for name in names if name not in result}
    return result


def renaming(config: GlowConfig, layout: Layout, name: str) -> Renaming:
    """Where the published tensor `name` belongs; its own name for one that is unknown."""
    if layout == "blocks":
        match = re.fullmatch(r"blocks\.(\d+)\.flows\.(\d+)\.(.+)\.(\w+)", name)
        if match is None:
            return Renaming(name)
        rest = re.sub(r"^coupling\.nets\.0\.", "block.", match[3])
        return _in_step(config, layout, int(match[1]), int(match[2]), rest, match[4])
    if match := re.fullmatch(r"flow\.layers\.(\d+)\.(.+)\.(\w+)", name):
        level, position = divmod(int(match[1]), config.steps + 2)
        if 1 <= position <= config.steps:
            return _in_step(config, layout, level, position - 1, match[2], match[3])
        if position == config.steps + 1 and match[2] in ("conv", "conv.conv"):
            ours = f"levels.{level}.prior.conv.{_LEAVES.get(match[3], match[3])}"
            return Renaming(ours, order=_deinterleaved(config.width(level)))
        return Renaming(name)
    for theirs, ours in _HEADS.items():
        if name.startswith(theirs):
            return Renaming(ours + _LEAVES.get(leaf := name.rpartition(".")[2], leaf))
    return Renaming(name)


def _in_step(config: GlowConfig, layout: Layout, level: int, step: int, rest: str, leaf: str) -> Renaming:
    module = _STEP.get(rest, rest)
    is_norm = rest.endswith("actnorm")
    leaf = (_NORM_LEAVES if is_norm else _LEAVES).get(leaf, leaf)
    order = None
    if module == "coupling.net.out" and config.coupling == "affine":
        channels = config.width(level)
        # shift first; theirs is the scale first, or every second one
        order = torch.arange(channels).roll(channels // 2) if layout == "blocks" else _deinterleaved(channels)
    return Renaming(f"levels.{level}.chain.steps.{step}.{module}.{leaf}", -1 if is_norm else 1, order)


def _deinterleaved(channels: int) -> Tensor:
    """Even channels, then odd ones."""
    return torch.cat([torch.arange(0, channels, 2), torch.arange(1, channels, 2)])


def _is_per_channel(name: str) -> bool:
    return name.rpartition(".")[2] in ("shift", "log_scale", "log_gain")


def _check_permutation(order: Tensor, theirs: Tensor, what: str) -> None:
    exact = order.dim() == 1 and bool((order.sort().values == torch.arange(len(order))).all())
    if exact and theirs.dim() == 2:
        exact = bool((theirs == torch.eye(len(order), dtype=theirs.dtype)[order]).all())
    if not exact:
        raise CheckpointError(f"{what} must be a permutation; give an intact file")
