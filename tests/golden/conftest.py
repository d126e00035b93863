"""Finds golden cases: weights, inputs and outputs of the originals, one folder a family.

Three places are read: the copies beside this file, `../shared/golden` next to the repository, and the folder that
the environment variable HFLOW_RT_GOLDEN names. A test module with `FAMILY = "name"` and a `golden` argument runs
once for every case of that family and both precisions.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent


@dataclass(frozen=True)
class GoldenCase:
    """One case at one precision."""

    path: Path
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.path.stem}-{str(self.dtype).removeprefix('torch.')}-{self.path.parent.parent.name}"

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
    found: dict[str, Path] = {}
    for root in roots:
        # a folder named by the environment may be the family's own
        for folder in (root / family, root):
            for path in sorted(folder.glob("*.json")):
                if json.loads(path.read_text()).get("family") == family:
                    found.setdefault(f"{root}/{path.stem}", path)
    return [GoldenCase(path, dtype) for path in found.values() for dtype in (torch.float64, torch.float32)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        cases = golden_cases(metafunc.module.FAMILY)
        assert cases, f"no golden case of {metafunc.module.FAMILY} found beside {__file__}"
        metafunc.parametrize("golden", cases, ids=str)
