"""Finds golden cases: weights, inputs and outputs of the originals, one folder a family; and computes what they list.

Three places are read: the copies beside this file, `../shared/golden` next to the repository, and the folder that
the environment variable HFLOW_RT_GOLDEN names. A case need not have every input and output of its family: it is
compared in what it has.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
Quantities = Iterator[tuple[str, Tensor]]


class Absent(Exception):  # noqa: N818 - no error: the case was made without it
    """An input that the case does not list."""


@dataclass(frozen=True)
class GoldenCase:
    """One case at one precision."""

    path: Path
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.path.stem}-{str(self.dtype).removeprefix('torch.')}-{self.path.parent.parent.name}"

    @property
    def is_ours(self) -> bool:
        """Whether it lies beside this file, and so is known to be whole."""
        return HERE in self.path.parents

    def description(self) -> dict[str, Any]:
        """The parsed JSON."""
        parsed: dict[str, Any] = json.loads(self.path.read_text())
        return parsed

    def weights(self) -> dict[str, Tensor]:
        """The original's tensors under the original's names."""
        return load_file(self.path.with_suffix(".weights.safetensors"))

    def tensors(self) -> dict[str, Tensor]:
        """All inputs and outputs as stored."""
        return load_file(self.path.with_suffix(".io.safetensors"))


def golden_cases(family: str) -> list[GoldenCase]:
    roots = [HERE, HERE.parents[2] / "shared" / "golden"]
    if "HFLOW_RT_GOLDEN" in os.environ:
        roots.append(Path(os.environ["HFLOW_RT_GOLDEN"]))
    found: dict[tuple[bytes, ...], Path] = {}  # by content: the same case may lie in several places
    for root in roots:
        # a folder named by the environment may be the family's own
        for folder in (root / family, root):
            for path in sorted(folder.glob("*.json")):
                if json.loads(path.read_text()).get("family") == family:
                    parts = (path, path.with_suffix(".weights.safetensors"), path.with_suffix(".io.safetensors"))
                    found.setdefault(tuple(_digest(part) for part in parts), path)
    return [GoldenCase(path, dtype) for path in found.values() for dtype in (torch.float64, torch.float32)]


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest() if path.exists() else b""


class Listed(dict[str, Tensor]):
    """Stored tensors by name. One that the case does not list is `Absent`; one that it only lists is a `KeyError`."""

    def __init__(self, stored: Mapping[str, Tensor], entries: Collection[Mapping[str, Any]]) -> None:
        super().__init__(stored)
        self.names = {entry["name"] for entry in entries}

    def __missing__(self, name: str) -> Tensor:
        raise KeyError(name) if name in self.names else Absent(name)


class Case:
    """What a golden case says of itself and lists; families add the networks that compute it."""

    def __init__(self, golden: GoldenCase) -> None:
        self.golden = golden
        self.description = golden.description()
        self.described = self.description["config"]
        self.stored = Listed(golden.tensors(), self.description["io"])
        self.dtype = golden.dtype
        self.listed = {
            entry["name"]: entry
            for entry in self.description["io"]
            if entry["role"] == "output" and not entry["name"].endswith(".f64")
        }

    def __getitem__(self, name: str) -> Tensor:
        value = self.stored[name]
        return value.to(self.dtype) if value.is_floating_point() else value


def compute(
    groups: Mapping[str, Callable[[Any], Quantities]], case: Any, outputs: Collection[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """What the groups compute whose pattern an output begins with; and the outputs that need an `Absent` input."""
    found: dict[str, Tensor] = {}
    absent: set[str] = set()
    for pattern, group in groups.items():
        wanted = {name for name in outputs if re.match(pattern, name)}
        try:
            for name, value in group(case) if wanted else ():
                found[name] = value
        except Absent:
            absent |= wanted - found.keys()
    return found, absent


def bound(case: Any, entry: dict[str, Any], name: str) -> tuple[Tensor, float]:
    """What an output must be, and how far it may be off (README of the golden cases).

    case: has the `stored` tensors of the original and the `dtype` it is computed in.
    """
    expected = case.stored[name].double()
    if entry["dtype"] in ("float64", "int64"):
        return expected, 1e-12 * entry["max_value"]
    if case.dtype == torch.float32:
        return expected, 4 * max(entry["max_abs_err"], entry["rerun_max_abs"]) + 2e-6 * entry["max_value"]
    if f"{name}.f64" in case.stored:
        return case.stored[f"{name}.f64"], 1e-10 * max(1.0, entry["max_value"])
    # the original in float32 is off by this much, so what is exact is as far from it
    return expected, 1.02 * entry["max_abs_err"] + 1e-12


@dataclass(frozen=True)
class Reduced:
    """A case without the inputs and outputs that `leaves_out` says; `key` is the list of them in its description."""

    whole: GoldenCase
    key: str
    leaves_out: Callable[[str], bool]
    is_ours = False

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def description(self) -> dict[str, Any]:
        whole = self.whole.description()
        return whole | {self.key: [entry for entry in whole[self.key] if not self.leaves_out(entry["name"])]}

    def weights(self) -> dict[str, Tensor]:
        return self.whole.weights()

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.whole.tensors().items() if not self.leaves_out(name)}
