"""Turn a published checkpoint into a run that every other command understands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hflow_rt.data.dataset import open_dataset
from hflow_rt.errors import ConfigError
from hflow_rt.files import atomic_directory, sha256
from hflow_rt.manifest import MODEL
from hflow_rt.models.checkpoint import build_model, check_state, load_state, save_model
from hflow_rt.models.family import FAMILIES, family

__all__ = ["Imported", "import_published"]

# A spread is a mean over thousands of elements: a few hundred images pin it to about a percent.
_IMAGES, _BATCH = 512, 16
_UNKNOWN_SCALES = (
    "noise scales are not in published files and stay at 1, which makes bits/dim meaningless but changes no image; "
    "estimate them with --images"
)


@dataclass(frozen=True)
class Imported:
    """What was read. parameters: tensors of the model, of `values` numbers. dropped: others, by kind.

    spreads: the images that noise scales were estimated from, or None.
    """

    run: str
    family: str
    resolution: int
    parameters: int
    values: int
    dropped: Mapping[str, int]
    spreads: Mapping[str, Any] | None
    notes: tuple[str, ...]
    sha256: str

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def import_published(
    path: Path,
    family_name: str,
    run: Path,
    settings: Path | None = None,
    images: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Imported:
    """Read the checkpoint at `path` and write the run folder `run`, which must not exist.

    settings: the original's settings, where the checkpoint does not hold them. images: a folder or archive to
    estimate noise scales from. Raises `CheckpointError`, `ConfigError` and `DataError`; nothing is written then.
    """
    reader = family(family_name).read_published
    if reader is None:
        able = ", ".join(sorted(name for name in FAMILIES if family(name).read_published))
        raise ConfigError(f"the {family_name} family reads no published checkpoints; these do: {able}")
    if run.exists():
        raise ConfigError(f"{run} exists already; choose another --output")
    progress(f"reading {path}")
    published = reader(path, settings)
    with torch.device("meta"):
        skeleton = build_model(family_name, published.config)
    check_state(skeleton, published.state, str(path))  # before memory is taken for what settings ask
    model = build_model(family_name, published.config).eval()
    load_state(model, published.state, str(path))
    parameters = sum(1 for _ in model.parameters())
    values = sum(parameter.numel() for parameter in model.parameters())
    notes, spreads = published.notes, None
    has_scales = bool(model.noise_scales())
    if images is not None:
        if not has_scales:
            raise ConfigError(f"this {family_name} model has no noise scales to estimate; leave --images out")
        pixels = open_dataset(images, model.resolution)
        chosen = np.unique(np.linspace(0, len(pixels) - 1, min(_IMAGES, len(pixels))).astype(int))
        progress(f"estimating noise scales from {len(chosen)} images")
        batches = np.split(chosen, range(_BATCH, len(chosen), _BATCH))
        count = model.estimate_spreads(torch.from_numpy(pixels.pixels(batch)) for batch in batches)
        spreads = {"source": str(images), "images": count}
    elif has_scales:
        notes += (_UNKNOWN_SCALES,)
    digest = sha256(path)
    about = {
        "imported_from": {"file": path.name, "sha256": digest, "bytes": path.stat().st_size},
        "notes": list(notes),
        "spreads": spreads,
    }
    progress(f"writing {run}")
    with atomic_directory(run) as folder:
        save_model(folder / MODEL, family_name, model, model.state_dict(), about)
    return Imported(
        run=str(run),
        family=family_name,
        resolution=model.resolution,
        parameters=parameters,
        values=values,
        dropped=published.dropped,
        spreads=spreads,
        notes=notes,
        sha256=digest,
    )
