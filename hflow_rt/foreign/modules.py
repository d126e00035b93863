"""Tensors of a pickled network: of the inert records of its modules, by the names that torch's `state_dict` gives."""

import re
from collections.abc import Iterator
from typing import Any, TypeVar

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.pickles import Inert
from hflow_rt.foreign.source import shown

__all__ = ["MOST_ENTRIES", "is_module", "module_tensors"]

MOST_ENTRIES = 100_000  # of all modules of a file; a large network has a few thousand
_DEPTH = 64
_PART = re.compile(r"\w{1,100}", re.ASCII)
_PARTS = ("_parameters", "_buffers", "_modules")

T = TypeVar("T")


def is_module(value: object) -> bool:
    """Whether this is the record of a network, and not of settings, callbacks or the like."""
    return isinstance(value, Inert) and value.state is not None and any(part in value.state for part in _PARTS)


def module_tensors(root: Inert, kind: type[T], file: str, entries_left: list[int]) -> Iterator[tuple[str, T]]:
    """Parameters and kept buffers, which are instances of `kind`, of a module and all below it.

    entries_left: how many more entries may be looked at; counted down, so that all modules of a file share it.
    Raises `CheckpointError`, which begins with `file`.
    """
    open_modules = [("", root, 0)]
    while open_modules:
        prefix, module, depth = open_modules.pop()
        state = module.state or {}
        parts: dict[str, dict[Any, Any]] = {}
        for key in _PARTS:
            part = state.get(key)
            if not isinstance(part, dict):
                raise CheckpointError(f"{file}: {shown(module.name)} is no module, which has {key}; save its weights")
            parts[key] = part
        entries_left[0] -= 1 + sum(map(len, parts.values()))
        if depth > _DEPTH or entries_left[0] < 0:
            raise CheckpointError(
                f"{file}: its modules are nested deeper than {_DEPTH}, or have more than {MOST_ENTRIES:,} entries, "
                "which no network needs; refused"
            )
        hidden = state.get("_non_persistent_buffers_set")
        for key, part in parts.items():
            for name, value in part.items():
                if type(name) is not str or not _PART.fullmatch(name):
                    raise CheckpointError(f"{file}: {shown(str(name))} is no name of a tensor or module; refused")
                if value is None or (key == "_buffers" and isinstance(hidden, set) and name in hidden):
                    continue
                if key == "_modules" and isinstance(value, Inert):
                    open_modules.append((f"{prefix}{name}.", value, depth + 1))
                elif key != "_modules" and isinstance(value, kind):
                    yield prefix + name, value
                else:
                    raise CheckpointError(f"{file}: {shown(prefix + name)} is of a wrong kind; save its weights")
