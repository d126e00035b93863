"""Statistics of data kept between runs, a safetensors file each, named by everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.evaluation.statistics import MAX_ROWS, Statistics
from hflow_rt.files import atomic_file

__all__ = ["FeatureCache", "cache_folder", "cache_key"]

_FORMAT = 2  # 2: folders split a set wherever they lie in it
_METADATA = "hflow_rt_features"


def cache_folder() -> Path:
    """`hflow-rt/features` in the user's cache: `$XDG_CACHE_HOME`, or `~/.cache`. Raises `ConfigError` if neither is."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # the specification says that a relative path must be ignored
        cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(
            "there is no home folder to keep features of data in; name a folder with --cache, or give --no-cache"
        ) from error
    return cache / "hflow-rt" / "features"


def cache_key(data: str, split: str, count: int, resolution: int, network: str) -> dict[str, Any]:
    """What statistics depend on. data: `ImageSet.hash`. count: images of the split. network: `FeatureNetwork.key`."""
    return {
        "format": _FORMAT,
        "data": data,
        "split": split,
        "count": count,
        "resolution": resolution,
        "network": network,
        "quantisation": "uint8",
        "rows": MAX_ROWS,
    }


class FeatureCache:
    """A folder of statistics. A file that cannot be used is a miss and a line to `say`, never an error."""

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self._say = say or (lambda line: print(line, file=sys.stderr))

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the statistics of `key` are."""
        return self.folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.safetensors"

    def load(self, key: Mapping[str, Any]) -> Statistics | None:
        """The statistics of `key`, or None."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "np") as file:
                if (file.metadata() or {}).get(_METADATA) != _text(key):
                    raise ValueError("it belongs to something else")
                found = {name: file.get_tensor(name) for name in ("n", "mean", "covariance", "rows")}
            return _checked(found)
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._say(f"note: cached features {path} cannot be used ({reason}); they are computed again")
            return None

    def save(self, key: Mapping[str, Any], found: Statistics) -> None:
        """Keep `found` for `key`."""
        tensors = {
            "n": np.array([found.n]),
            "mean": found.mean,
            "covariance": np.ascontiguousarray(found.covariance),
            "rows": found.rows,
        }
        try:
            with atomic_file(self.path(key)) as temporary:
                temporary.write_bytes(save(tensors, {_METADATA: _text(key)}))
        except DataError as error:
            self._say(f"note: the features are not cached: {error}")


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _checked(found: dict[str, Any]) -> Statistics:
    n, mean, covariance, rows = (found[name] for name in ("n", "mean", "covariance", "rows"))
    d = mean.size
    shapes = (n.shape, mean.shape, covariance.shape, rows.shape)
    kinds = (n.dtype, mean.dtype, covariance.dtype, rows.dtype)
    count = int(n[0]) if n.shape == (1,) else 0
    if shapes != ((1,), (d,), (d, d), (min(count, MAX_ROWS), d)) or kinds != (np.int64, *2 * (np.float64,), np.float32):
        raise ValueError("it holds other arrays than statistics")
    if not all(np.isfinite(values).all() for values in (mean, covariance, rows)):
        raise ValueError("it holds NaN or infinity")
    return Statistics(count, mean, covariance, rows)
