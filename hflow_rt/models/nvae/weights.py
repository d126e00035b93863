"""Published names of tensors and ours (spec 14)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["from_original", "is_duplicate", "our_names"]

_PARTS = {
    "prior_ftr0": "top",
    "pre_process": "before",
    "enc_tower": "encoder",
    "enc0": "encoder_end",
    "enc_sampler": "posteriors",
    "dec_sampler": "priors",
    "nf_cells": "flows",
    "dec_tower": "decoder",
    "post_process": "after",
    "image_conditional": "head",
}
_LEAVES = {
    r"\.log_weight_norm$": ".log_norm",
    r"\.cell1\.": ".first.",
    r"\.cell2\.": ".second.",
    r"\.conv\.convz\.0\.": ".expand.",
    r"\.conv\.convz\.2\.": ".depthwise.",
    r"\.mu\.conv_0\.": ".merge.",
    r"\._ops\.(\d)\.bn_act\.": r".body.\1.norm.",
    r"\._ops\.(\d)\.conv_0\.": r".body.\1.conv.",
    r"\.se\.se\.0\.": ".gate.reduce.",
    r"\.se\.se\.2\.": ".gate.expand.",
    r"\.skip\.1\.": ".skip.conv.",
}
_DOWN_SKIP = re.compile(r"\.skip\.conv_([1-4])\.")
_INVERTED = re.compile(r"\._ops\.0\.conv\.(\d)\.(bn\.|conv\.0\.|conv\.1\.|)(?=[a-z_]+$)")
# by position in an inverted residual, of one that does not upsample first
_INVERTED_PARTS = {
    (0, "bn."): "norm_in",
    (1, "conv.0."): "expand",
    (1, "conv.1."): "norm_expanded",
    (2, "conv.0."): "depthwise",
    (2, "conv.1."): "norm_depthwise",
    (3, ""): "project",
    (4, "bn."): "norm_out",
}


def is_duplicate(name: str) -> bool:
    """Whether a published tensor is a second name of another one."""
    return name.endswith(".weight_normalized")


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Published names, of a whole network or of its cells, to ours; an unknown name keeps its own."""
    listed = list(names)
    upsampling = {match[1] for name in listed if (match := re.match(r"(\w+\.\d+)\.skip\.1\.", name))}
    return {name: _our_name(name, upsampling) for name in listed}


def _our_name(name: str, upsampling: set[str]) -> str:
    head, dot, rest = name.partition(".")
    cell = ".".join(name.split(".")[:2])

    def inverted(match: re.Match[str]) -> str:
        part = _INVERTED_PARTS.get((int(match[1]) - (cell in upsampling), match[2]))
        return match[0] if part is None else f".body.{part}."

    name = f"{_PARTS.get(head, head)}{dot}{rest}"
    for pattern, ours in _LEAVES.items():
        name = re.sub(pattern, ours, name)
    name = _DOWN_SKIP.sub(lambda match: f".skip.convs.{int(match[1]) - 1}.", name)
    return _INVERTED.sub(inverted, name)


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under the names of `Network`, without duplicates.

    The counters that every batch norm has beside its statistics, which files may lack, are 0 then.
    """
    kept = {name: tensor for name, tensor in state.items() if not is_duplicate(name)}
    found = {ours: kept[theirs] for theirs, ours in our_names(kept).items()}
    for name in [name for name in found if name.endswith(".running_mean")]:
        found.setdefault(name.replace(".running_mean", ".num_batches_tracked"), torch.tensor(0))
    return found
