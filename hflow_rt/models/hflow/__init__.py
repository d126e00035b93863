"""hflow: an invertible hierarchical flow for images (Timonen, Aittala & Lehtinen, TMLR 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hflow_rt.models.hflow.config import HFlowConfig
from hflow_rt.models.hflow.presets import PRESETS, TINY
from hflow_rt.models.registry import Family, Published

if TYPE_CHECKING:
    from hflow_rt.models.family import LatentModel

__all__ = ["FAMILY"]


def _build(config: Any) -> LatentModel:
    from hflow_rt.models.hflow.network import HFlow

    return HFlow(config)


def _read_published(path: Path, settings: Path | str | None, part: str | None) -> Published:
    from hflow_rt.models.hflow.published import read_published

    return read_published(path, settings, part)


FAMILY = Family("hflow", "hflow, invertible hierarchical flow", HFlowConfig, PRESETS, TINY, _build, _read_published)
