"""Settings of a run: from a preset, then a file, then `--set a.b=c`. Every schedule counts images."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError, model_validator

from hflow_rt.errors import ConfigError
from hflow_rt.models.registry import FAMILIES, ModelConfig, family

__all__ = ["OptimizerConfig", "RunConfig", "TrainingConfig", "load_config", "preset_names"]

# what people can wait for, and every counter holds
_Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
_Images = Annotated[int, Field(gt=0, le=2**53)]
_FromImage = Annotated[int, Field(ge=0, le=2**53)]
_Rate = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_M = TypeVar("_M", bound=BaseModel)
_Group = str  # of parameters, as the family names them
_Kind = Literal["adam", "adamax"]
_Betas = tuple[_Decay, _Decay]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class OptimizerConfig(BaseModel):
    """What one of several optimizers has other than the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: _Kind | None = None
    betas: _Betas | None = None
    eps: _Positive | None = None
    weight_decay: _Rate | None = None


class TrainingConfig(BaseModel):
    """How to train. One step sees `batch_size * accumulate` images in each process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: _Count = 4  # images of one micro-batch
    accumulate: _Count = 4  # micro-batches of one step
    images: _Images = 60_000_000  # to see in all: 2000 epochs of 30,000

    optimizer: _Kind = "adam"
    betas: _Betas = (0.9, 0.999)  # of the running moments of the gradient
    eps: _Positive = 1e-8  # beside the second moment
    weight_decay: _Rate = 0.0  # times the weights is added to their gradient
    optimizers: dict[str, OptimizerConfig] = {}  # what is different, by optimizer, for families with several
    learning_rates: dict[_Group, _Rate]
    warmup_images: _FromImage = 0  # rates grow from 0 to theirs
    decay: Literal["steps", "cosine"] = "steps"
    decay_start_images: _FromImage = 300_000
    decay_every_images: _Images = 60_000  # what rates change at
    decay_factors: dict[_Group, _Rate] = {}  # of steps: from the start on, once every `decay_every_images`
    decay_end_images: _Images | None = None  # of a cosine; by default `images`
    final_rates: dict[_Group, _Rate] = {}  # of a cosine, else 0
    cut_images: dict[_Group, _FromImage] = {}  # from here on the rate is 0
    frozen: tuple[str, ...] = ()  # names of parameters that stay as they are, with * for any part
    grad_clip: _Positive | None = 50.0  # global norm of the gradient of an optimizer; null for any

    skipped_steps: Annotated[int, Field(ge=0, le=1000)] = 0  # in a row, whose loss or gradient is not finite

    ema_weight: Annotated[float, Field(gt=0, le=1)] = 0.005  # of the new weights, each step
    ema_growing: bool = False  # the new weights of step n have a weight of at least 9 / (10 + n)
    ema_half_life_images: _Positive | None = None  # instead of `ema_weight`: when former weights count half
    ema_ramp: _Positive | None = None  # the half-life is at most this share of the images seen
    ema_warmup_images: _FromImage = 30_000  # until then the average is a copy

    added_noise_std: _Rate = 0.005  # Gaussian, in units of the range of values
    flip: bool = True  # mirror half of the images
    init_images: _Images = 64  # for the data-dependent initialisation
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["no", "fp16", "bf16"] = "no"

    log_every: _Count = 10  # steps
    sample_every_images: _Images = 20_000
    evaluate_every_images: _Images = 20_000
    evaluate_images: _Images = 200  # held-out images, at most
    evaluate_samples: Annotated[int, Field(ge=2, le=100_000)] = 200  # where nothing else is measured
    evaluate_draws: _Count = 1  # of an image, for every bound but a published one
    checkpoint_every_images: _Images = 20_000
    keep_last: _Count = 3  # checkpoints

    def optimizer_settings(self, name: str) -> OptimizerConfig:
        """Those of the optimizer `name`, complete."""
        common = {"kind": self.optimizer, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        own = self.optimizers.get(name, OptimizerConfig()).model_dump(exclude_none=True)
        return OptimizerConfig(**common | own)

    @model_validator(mode="after")
    def _one_average(self) -> TrainingConfig:
        if self.ema_ramp is not None and self.ema_half_life_images is None:
            raise ValueError("ema_ramp shortens a half-life; give ema_half_life_images too")
        if self.ema_growing and self.ema_half_life_images is not None:
            raise ValueError("ema_growing belongs to ema_weight; a half-life grows with ema_ramp")
        return self


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run but its images."""

    family: str
    preset: str | None
    model: ModelConfig
    training: TrainingConfig

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        side: int = self.model.resolution  # type: ignore[attr-defined]  # every family's settings have it
        return side

    @property
    def channels(self) -> int:
        """Of the images: 3, or 1 for grey."""
        return self.model.channels

    def dump(self) -> dict[str, Any]:
        """As plain JSON values; `load_config(file)` reads them back."""
        return {
            "family": self.family,
            "preset": self.preset,
            "model": self.model.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
        }

    def with_images(self, images: int) -> RunConfig:
        """The same run, to see `images` in all."""
        training = {**self.training.model_dump(), "images": images}
        return RunConfig(
            self.family, self.preset, self.model, _validate(TrainingConfig, training, "training", training)
        )


def preset_names() -> list[str]:
    """Every preset of every family."""
    return sorted(name for found in FAMILIES for name in family(found).presets)


def load_config(
    preset: str | None = None,
    file: Path | str | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """A run's settings: `preset`, changed by `file` (a path or its contents), changed by each `a.b=c`.

    A file with a `family` is complete, as run.json is; one with only a `preset` holds changes to it.
    Raises `ConfigError`, one line that names the setting.
    """
    values = file if isinstance(file, Mapping) else {} if file is None else _read(Path(file))
    source = "the settings" if file is None or isinstance(file, Mapping) else str(file)
    _check_keys(values, ("family", "preset", "model", "training", "run"), source)
    for key in ("family", "preset"):
        if not isinstance(values.get(key), str | None):
            raise ConfigError(f"{key} must be a name in {source}; found {values[key]!r}")
    base: Mapping[str, Any] = {}
    if preset is None and "family" in values:
        name, preset = values["family"], values.get("preset")
    elif preset is not None or "preset" in values:
        preset = preset or values["preset"]
        name, base = _find_preset(preset)
        if values.get("family", name) != name:
            raise ConfigError(f"preset '{preset}' belongs to family '{name}', and {source} says '{values['family']}'")
    else:
        known = ", ".join(preset_names())
        raise ConfigError(f"{source} must name a 'preset' or a 'family'; known presets: {known}")
    given = {part: _merge(base.get(part, {}), values.get(part, {}), part) for part in ("model", "training")}
    settings = _build(name, preset, given, given)
    if not overrides:
        return settings
    complete = {part: settings.dump()[part] for part in ("model", "training")}
    changed = deepcopy(complete)
    for text in overrides:
        _override(changed, text)
    return _build(name, preset, changed, complete)


def _build(name: str, preset: str | None, values: Mapping[str, Any], known: Mapping[str, Any]) -> RunConfig:
    _check_keys(values, ("model", "training"), "--set", known)
    model = _validate(family(name).config, values["model"], "model", known["model"])
    return RunConfig(name, preset, model, _validate(TrainingConfig, values["training"], "training", known["training"]))


def _find_preset(preset: str) -> tuple[str, Mapping[str, Any]]:
    for name in FAMILIES:
        presets = family(name).presets
        if preset in presets:
            return name, presets[preset]
    raise ConfigError(f"unknown preset '{preset}'{_close(preset, preset_names())}; known: {', '.join(preset_names())}")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text("utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; name a .json or .toml file") from error
    except ValueError as error:
        raise ConfigError(f"{path} is neither whole JSON nor TOML (.toml): {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold an object with 'model' and 'training', not a {type(found).__name__}")
    return found


def _merge(base: Any, change: Any, where: str) -> Any:
    """`base` with the entries of `change`; objects are merged, everything else is replaced."""
    if not isinstance(base, Mapping):
        return deepcopy(change)
    if not isinstance(change, Mapping):
        raise ConfigError(f"{where} must be an object with settings, not {json.dumps(change)}")
    merged = dict(base)
    for key, value in change.items():
        merged[key] = _merge(base.get(key), value, f"{where}.{key}")
    return merged


def _override(values: Any, text: str) -> None:
    """Set one value; what does not exist yet is made, so that validation can say what is wrong with it."""
    key, equals, raw = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set takes a.b=value, for example training.batch_size=8; found '{text}'")
    try:
        value = json.loads(raw)
    except ValueError:
        value = raw
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        where = ".".join(path[:depth])
        if isinstance(values, list):
            if not part.isdigit() or int(part) >= len(values):
                raise ConfigError(f"{where} has entries 0 to {len(values) - 1}; found '{part}' in --set {text}")
            index: Any = int(part)
        elif isinstance(values, dict):
            index = part
        else:
            raise ConfigError(f"{where} is a single value and has no '{part}'; set {where}=VALUE")
        if last:
            values[index] = value
        else:
            if isinstance(values, dict) and values.get(index) is None:
                values[index] = {}
            values = values[index]


def _validate(kind: type[_M], values: Any, where: str, known: Any) -> _M:
    """Validated settings; the first mistake is a `ConfigError` with its dotted name and names close to it."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            names = [*_dotted(known, where), *(f"{where}.{field}" for field in kind.model_fields)]
            raise ConfigError(f"unknown setting {path}{_close(path, names)}") from error
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] == "missing" else f"; found {json.dumps(first['input'], default=str)[:80]}"
        raise ConfigError(f"{path}: {message}{found}") from error


def _check_keys(values: Mapping[str, Any], allowed: Iterable[str], source: str, known: Any = None) -> None:
    allowed = list(allowed)
    for key in values:
        if key not in allowed:
            names = [*allowed, *_dotted(known or {}, "")]
            endings = [name for name in names if name.rpartition(".")[2] == key]  # the part before was forgotten
            near = f"; did you mean {', '.join(endings[:3])}?" if endings else _close(key, names)
            raise ConfigError(f"unknown setting {key} in {source}{near or '; known: ' + ', '.join(allowed)}")


def _dotted(values: Any, where: str) -> Iterator[str]:
    """The dotted names of everything inside."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        name = f"{where}.{key}" if where else str(key)
        yield name
        yield from _dotted(value, name)


def _close(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(names), 3)
    return f"; did you mean {', '.join(near)}?" if near else ""
