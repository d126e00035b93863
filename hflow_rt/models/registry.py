"""Which families there are: their settings and presets, read without torch, and the function that builds their models.

A family is a folder `hflow_rt/models/<name>/` whose package exposes one `Family` object; `hflow_rt.models.family` says
what its models do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hflow_rt.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from hflow_rt.models.family import LatentModel

__all__ = ["DEFAULT_PRESET", "FAMILIES", "Family", "ModelConfig", "Published", "Settings", "View", "family"]


class Settings(BaseModel):
    """Base of all settings of models: typed, closed, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class View(Settings):
    """What is drawn of an image whose model knows more than its pixels: `resolution` a side of a square `region`.

    region: left, top, right and bottom in shares of the image, from its top left.
    """

    resolution: Annotated[int, Field(ge=1, le=1 << 14)]
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @field_validator("region", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """Also as people type it."""
        parts = value.split(",") if isinstance(value, str) else value
        try:
            left, top, right, bottom = map(float, parts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a region is four numbers LEFT,TOP,RIGHT,BOTTOM; found {value}") from error
        return left, top, right, bottom

    @property
    def typed(self) -> str | None:
        """The region as people type it; None for all of the image."""
        whole = type(self).model_fields["region"].default
        return None if self.region == whole else ",".join(f"{share:g}" for share in self.region)

    @model_validator(mode="after")
    def _check(self) -> View:
        left, top, right, bottom = self.region
        shown = ",".join(f"{share:g}" for share in self.region)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):  # NaN is neither
            raise ValueError(f"a region LEFT,TOP,RIGHT,BOTTOM must rise within 0 .. 1; found {shown}")
        if abs((right - left) - (bottom - top)) > 1e-6:
            raise ValueError(f"a region must be as wide as high; found {shown}")
        return self


class ModelConfig(Settings):
    """Base of every family's settings. Beside `channels` all have `resolution`, the side of the square image.

    A family of colour images alone declares `channels: Literal[3] = 3`. One that can draw an image at any pixels has
    `view: View | None = None`, of which `LatentModel.resolution` is the side.
    """

    channels: Literal[1, 3] = Field(default=3, description="of the image: 3 colours, or 1 for grey")


@dataclass(frozen=True)
class Published:
    """What a family's reader makes of a checkpoint that others published.

    state: weights under our names, float32; all that `LatentModel.state_dict` has. dropped: tensors that are not
    needed, by kind. notes: what the user has to know. part, prefix, passed_over: where in the file they lie, see
    `hflow_rt.foreign.parts.Part`.
    """

    config: ModelConfig
    state: Mapping[str, Tensor]
    dropped: Mapping[str, int]
    notes: tuple[str, ...] = ()
    part: str = "."
    prefix: str = ""
    passed_over: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """How the rest of the project finds a family: its settings class, presets, model class.

    tiny: settings like a preset's, of a model with every part that others have and as small as can be, on which the
    contract is tested. read_published: reads a published checkpoint and, where that does not hold them, its settings
    from another file; of a checkpoint that holds several networks the part that the third argument names. Executes
    nothing. Raises `CheckpointError` and `ConfigError`.
    """

    name: str
    title: str
    config: type[ModelConfig]
    presets: Mapping[str, Mapping[str, Any]]
    tiny: Mapping[str, Any]
    build: Callable[[Any], LatentModel]
    read_published: Callable[[Path, Path | None, str | None], Published] | None = None


# name -> module that holds `FAMILY`; one line a family
FAMILIES = {
    "glow": "hflow_rt.models.glow",
    "hflow": "hflow_rt.models.hflow",
    "ihdm": "hflow_rt.models.ihdm",
    "inrgan": "hflow_rt.models.inrgan",
    "nvae": "hflow_rt.models.nvae",
}
DEFAULT_PRESET = "hflow-demo"  # of `hflow-rt train` and `demo`: small enough to be trained while somebody waits


def family(name: str) -> Family:
    """The family called `name`. Raises `ConfigError` for an unknown one."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family '{name}'; known: {', '.join(sorted(FAMILIES))}")
    found: Family = importlib.import_module(FAMILIES[name]).FAMILY
    return found
