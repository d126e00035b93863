"""Folding: an inference copy of a module in which everything that does not depend on the input is a constant.

A layer takes part by having a method `fold() -> nn.Module`, called on a float64 copy, that returns its
replacement.
"""

import copy
from typing import TypeVar

from torch import nn

__all__ = ["fold_children", "folded_copy"]

M = TypeVar("M", bound=nn.Module)


def folded_copy(module: M) -> M:
    """A float32 eval copy of `module` with every foldable layer replaced; constants are computed in float64."""
    clone = copy.deepcopy(module).double().eval().requires_grad_(False)
    fold_children(clone)
    clone.float()
    return clone.requires_grad_(False)


def fold_children(module: nn.Module) -> None:
    """Replace, in place and recursively, each child that has a `fold` method."""
    for name, child in module.named_children():
        fold = getattr(child, "fold", None)
        if callable(fold):
            setattr(module, name, fold())
        else:
            fold_children(child)
