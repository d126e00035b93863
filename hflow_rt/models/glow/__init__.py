"""Glow: a multi-scale flow with invertible 1x1 convolutions (Kingma & Dhariwal, NeurIPS 2018)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.presets import PRESETS, TINY
from hflow_rt.models.registry import Family, Published

if TYPE_CHECKING:
    from hflow_rt.models.family import LatentModel

__all__ = ["FAMILY"]


def _build(config: Any) -> LatentModel:
    from hflow_rt.models.glow.network import Glow

    return Glow(config)


def _read_published(path: Path, settings: Path | str | None, part: str | None) -> Published:
    from hflow_rt.models.glow.published import read_published

    return read_published(path, settings, part)


FAMILY = Family("glow", "Glow, multi-scale flow", GlowConfig, PRESETS, TINY, _build, _read_published)
