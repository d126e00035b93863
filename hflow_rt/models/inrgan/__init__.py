"""INR-GAN: images as networks from coordinates to colours (Skorokhodov, Ignatyev & Elhoseiny, CVPR 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hflow_rt.models.inrgan.config import INRGANConfig
from hflow_rt.models.inrgan.presets import PRESETS, TINY
from hflow_rt.models.registry import Family, Published

if TYPE_CHECKING:
    from hflow_rt.models.family import LatentModel

__all__ = ["FAMILY"]


def _build(config: Any) -> LatentModel:
    from hflow_rt.models.inrgan.model import INRGAN

    return INRGAN(config)


def _read_published(path: Path, settings: Path | str | None, part: str | None) -> Published:
    from hflow_rt.models.inrgan.published import read_published

    return read_published(path, settings, part)


FAMILY = Family(
    "inrgan", "INR-GAN, implicit neural representations", INRGANConfig, PRESETS, TINY, _build, _read_published
)
