"""Latents files: safetensors that know their order and where they are from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hflow_rt.errors import DataError
from hflow_rt.files import atomic_file, is_file
from hflow_rt.runtime.latents.operations import Latents
from hflow_rt.runtime.latents.round_trips import RoundTrip
from hflow_rt.runtime.session import LATENT_SPACE, Session

__all__ = [
    "Made",
    "about_model",
    "as_made",
    "check_latents_name",
    "how_made",
    "latents_file",
    "load_latents",
    "save_latents",
]

_METADATA_KEY = "hflow_rt.latents"


class Made(BaseModel):
    """How latents were made, as far as decoding them depends on it; the rest of a file's metadata is ignored."""

    model_config = ConfigDict(frozen=True)

    model: str | None = None
    controls: dict[str, float] = {}
    steps: int | None = None
    space: str = LATENT_SPACE
    round_trip: RoundTrip | None = None


def how_made(metadata: Mapping[str, Any], source: str) -> Made:
    """What the metadata of the latents file `source` say. Raises `DataError` for what cannot be."""
    try:
        return Made.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{source} says {where} that cannot be ({first['msg']}); encode it again") from error


def about_model(session: Session) -> dict[str, Any]:
    """What a file says of the model its latents are of."""
    return {"family": session.manifest.family, "model": session.manifest.checkpoint["sha256"]}


def check_latents_name(path: Path) -> None:
    """Raise `DataError` unless the name is one of a latents file."""
    if path.suffix.lower() != ".safetensors":
        raise DataError(f"a latents file's name must end in .safetensors; found '{path.name}'; rename it")


def save_latents(path: Path | str, latents: Latents, metadata: Mapping[str, Any]) -> None:
    """Write latents and what is known of them (family, model hash, seed, ...: JSON values) as safetensors.

    Raises `DataError` if the file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(latents_file(latents, metadata))


def latents_file(latents: Latents, metadata: Mapping[str, Any]) -> bytes:
    """The content of such a file. An array of numbers that half precision holds is stored so, which loses nothing."""
    # contiguous because safetensors writes the memory as it lies; the order because it sorts the names
    arrays = {name: np.ascontiguousarray(_small(values)) for name, values in latents.items()}
    header = json.dumps({"order": list(latents), "metadata": dict(metadata)})
    return save(arrays, {_METADATA_KEY: header})


def as_made(session: Session, files: Sequence[Path]) -> Session:
    """The session with the steps and controls that all these latents files were made with. Raises `DataError`."""
    found = [how_made(_opened(path)[1], str(path)) for path in files]
    for path, made in zip(files, found, strict=True):
        if (made.controls, made.steps) != (found[0].controls, found[0].steps):
            raise DataError(
                f"{files[0]} and {path} were made with different controls or steps; choose files that were made alike"
            )
    if not found:
        return session
    session = session if found[0].steps is None else session.in_steps(found[0].steps)
    return session.with_controls(found[0].controls)


def load_latents(path: Path | str) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Latents in the order they were saved, and their metadata.

    Raises `DataError` for a missing or broken file and for one that `save_latents` did not write. Whether the
    latents fit a model is for `check_latents` to say.
    """
    return _opened(path, arrays=True)


def _opened(path: Path | str, arrays: bool = False) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """As `load_latents`; only the metadata unless `arrays` are wanted."""
    path = Path(path)
    if not is_file(path):
        raise DataError(f"no latents file at {path}; write one with 'hflow-rt encode' or 'hflow-rt sample'")
    try:
        with safe_open(path, "np") as file:
            header = (file.metadata() or {}).get(_METADATA_KEY)
            if header is None:
                raise DataError(f"{path} holds tensors but no latents; give a file written by 'hflow-rt encode'")
            described = json.loads(header)
            order, metadata = described["order"], described["metadata"]
            if sorted(order) != sorted(file.keys()) or not isinstance(metadata, dict):
                raise ValueError("names differ from the header's")
            read = {name: file.get_tensor(name) for name in (order if arrays else ())}
            halves = {name: array.astype(np.float32) for name, array in read.items() if array.dtype == np.float16}
            return read | halves, metadata
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is not a whole latents file ({reason}); encode or copy it again") from error


def _small(values: NDArray[np.float32]) -> NDArray[Any]:
    """In half precision if that is the same."""
    with np.errstate(over="ignore"):
        half = np.asarray(values).astype(np.float16)
    return half if (half == values).all() else np.asarray(values)
