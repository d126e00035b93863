"""IHDM: inverse heat dissipation, images from blur to sharp (Rissanen, Heinonen & Solin, ICLR 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.presets import PRESETS, TINY
from hflow_rt.models.registry import Family, Published

if TYPE_CHECKING:
    from hflow_rt.models.family import LatentModel

__all__ = ["FAMILY"]


def _build(config: Any) -> LatentModel:
    from hflow_rt.models.ihdm.model import IHDM

    return IHDM(config)


def _read_published(path: Path, settings: Path | str | None, part: str | None) -> Published:
    from hflow_rt.models.ihdm.published import read_published

    return read_published(path, settings, part)


FAMILY = Family("ihdm", "IHDM, inverse heat dissipation", IHDMConfig, PRESETS, TINY, _build, _read_published)
