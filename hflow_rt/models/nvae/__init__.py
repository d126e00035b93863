"""NVAE: a deep hierarchical variational autoencoder (Vahdat & Kautz, NeurIPS 2020)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.presets import PRESETS, TINY
from hflow_rt.models.registry import Family, Published

if TYPE_CHECKING:
    from hflow_rt.models.family import LatentModel

__all__ = ["FAMILY"]


def _build(config: Any) -> LatentModel:
    from hflow_rt.models.nvae.model import NVAE

    return NVAE(config)


def _read_published(path: Path, settings: Path | str | None, part: str | None) -> Published:
    from hflow_rt.models.nvae.published import read_published

    return read_published(path, settings, part)


FAMILY = Family("nvae", "NVAE, hierarchical autoencoder", NVAEConfig, PRESETS, TINY, _build, _read_published)
