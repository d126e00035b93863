"""Folding: an inference copy of a module in which everything that does not depend on the input is a constant.

A layer takes part by having a method `fold() -> nn.Module`, called on a float64 copy, that returns its replacement. A
family names functions for classes of its own, so that what is folded need not know what folds it.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

__all__ = ["Folds", "fold_children", "folded_copy"]

M = TypeVar("M", bound=nn.Module)
# class -> what makes the replacement of a module of exactly that class
Folds = Mapping[type[nn.Module], Callable[[Any], nn.Module]]


def folded_copy(module: M, folds: Folds | None = None) -> M:
    """A float32 eval copy of `module` with every foldable layer replaced; constants are computed in float64."""
    clone = copy.deepcopy(module).double().eval().requires_grad_(False)
    fold_children(clone, folds)
    clone.float()
    return clone.requires_grad_(False)


def fold_children(module: nn.Module, folds: Folds | None = None) -> None:
    """Replace, in place and recursively, each child that `folds` names or that has a `fold` method."""
    for name, child in module.named_children():
        fold = (folds or {}).get(type(child)) or getattr(type(child), "fold", None)
        if fold is not None:
            setattr(module, name, fold(child))
        else:
            fold_children(child, folds)
