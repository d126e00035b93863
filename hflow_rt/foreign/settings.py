"""Settings that others wrote, as JSON: size, depth and numbers are bounded before anybody works with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from hflow_rt.errors import ConfigError
from hflow_rt.foreign.source import shown

__all__ = ["own_settings", "parse_settings", "read_settings_file"]

_BYTES = 1 << 20
_DEPTH = 16
_ITEMS = 10_000
_LARGEST = 1 << 31


def own_settings(given: Path | str | None, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of ours: of a JSON file, those of the `preset` it may name below the others, or of the preset `given`.

    Raises `ConfigError`.
    """
    values = {} if given is None else {"preset": given} if isinstance(given, str) else dict(read_settings_file(given))
    preset = values.pop("preset", None)
    if preset is None:
        return values
    if preset not in presets:
        raise ConfigError(f"the preset must be one of {', '.join(sorted(presets))}, not {shown(str(preset))}")
    return dict(presets[preset]["model"]) | values


def read_settings_file(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file. Raises `ConfigError`, also for the name of a preset, which is no file."""
    if isinstance(path, str):
        raise ConfigError(f"no preset gives the settings of such a file; omit --preset {path}, or name --settings FILE")
    try:
        if not S_ISREG(path.stat().st_mode):
            raise ConfigError(f"no settings file at {path}; name the JSON file that belongs to the checkpoint")
        with open(path, "rb") as file:
            content = file.read(_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"no settings file at {path}; name the JSON file that belongs to the checkpoint") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_settings(content, str(path))


def parse_settings(content: bytes, source: str) -> dict[str, Any]:
    """The object in JSON text. Raises `ConfigError` if it is none, too large, too deep, or holds wild numbers."""
    if len(content) > _BYTES:
        raise ConfigError(f"{source}: settings must be at most {_BYTES >> 20} MB of JSON")
    try:
        found = json.loads(content, parse_constant=_refuse_constant)
        _check(found, 0, [_ITEMS])
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else shown(str(error))
        raise ConfigError(f"{source}: the settings are no usable JSON ({reason})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: the settings must be a JSON object, not a {type(found).__name__}")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _check(value: object, depth: int, items_left: list[int]) -> None:
    items_left[0] -= 1
    if depth > _DEPTH or items_left[0] < 0:
        raise ValueError(f"nested deeper than {_DEPTH} or more than {_ITEMS:,} values")
    if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:  # nan neither
        raise ValueError(f"a number must be within {_LARGEST:,}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(inner, depth + 1, items_left)
