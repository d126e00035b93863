"""Turn a published checkpoint into a run that every other command understands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hflow_rt.data.dataset import open_dataset
from hflow_rt.errors import CheckpointError, ConfigError, DataError, HFlowError
from hflow_rt.files import atomic_directory, sha256
from hflow_rt.foreign.parts import WHOLE
from hflow_rt.manifest import MODEL
from hflow_rt.models.checkpoint import build_model, check_state, load_state, save_model, skeleton
from hflow_rt.models.family import LatentModel, Unknown
from hflow_rt.models.registry import DEFAULT_PRESET, FAMILIES, Published, family

__all__ = ["Imported", "import_published"]

_BATCH = 16
# Bytes of masks, which a model makes itself: those of the presets are below a hundredth of the weights'.
_FEW_MASKS, _MOST_MASKS = 64 << 20, 1 << 30


@dataclass(frozen=True)
class Imported:
    """What was read. parameters: tensors of the model, of `values` numbers. dropped: others, by kind.

    part, prefix, passed_over: where in the file they lie, see `Part`. learned: what the file lacks and was estimated,
    and from which images (held_out: those of the source left out), or None.
    """

    run: str
    family: str
    resolution: int
    channels: int
    parameters: int
    values: int
    dropped: Mapping[str, int]
    part: str
    prefix: str
    passed_over: Mapping[str, str]
    learned: Mapping[str, Any] | None
    notes: tuple[str, ...]
    sha256: str

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def import_published(
    path: Path,
    family_name: str | None,
    run: Path,
    settings: Path | None = None,
    images: Path | None = None,
    part: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Imported:
    """Read the checkpoint at `path` and write the run folder `run`, which must not exist.

    family_name: by default the one whose reader takes the file. settings: the original's settings, where the checkpoint
    does not hold them. images: a folder or archive, of whose training part what the file lacks is estimated. part:
    which weights, where the checkpoint holds several. Raises `CheckpointError`, `ConfigError` and `DataError`; nothing
    is written then.
    """
    if lexists(run):  # False for a path that cannot be asked, which writing reports
        raise ConfigError(f"{run} exists already; choose another --output")
    progress(f"reading {path}")
    family_name, published = _read(path, family_name, settings, part)
    bare = skeleton(family_name, published.config)
    # before memory is taken for what settings ask
    check_state(bare, published.state, str(path))
    _check_masks(bare, published.state, str(path))
    model = build_model(family_name, published.config).eval()
    load_state(model, published.state, str(path))
    parameters = sum(1 for _ in model.parameters())
    values = sum(parameter.numel() for parameter in model.parameters())
    notes, learned, unknown = published.notes, None, model.unknown()
    if images is not None:
        if unknown is None:
            raise ConfigError(f"this {family_name} model lacks nothing that images tell; omit --images")
        learned = _learn(model, unknown, images, str(path), progress)
        if held_out := learned["held_out"]:
            what = f"{unknown.what} are of the training part of {images}"
            notes += (f"{what}; {held_out} held-out images were left out",)
    elif unknown is not None:
        what = f"{unknown.what} are not in published files and {unknown.without}"
        notes += (f"{what}; estimate them with --images",)
    digest = sha256(path)
    where = {"part": published.part} if published.part != WHOLE else {}
    where |= {"prefix": published.prefix} if published.prefix else {}
    about = {
        "imported_from": {"file": path.name, "sha256": digest, "bytes": path.stat().st_size} | where,
        "notes": list(notes),
        "learned": learned,
    }
    progress(f"writing {run}")
    with atomic_directory(run, replace=False) as folder:
        save_model(folder / MODEL, family_name, model, model.state_dict(), about)
    return Imported(
        run=str(run),
        family=family_name,
        resolution=model.resolution,
        channels=model.channels,
        parameters=parameters,
        values=values,
        dropped=published.dropped,
        part=published.part,
        prefix=published.prefix,
        passed_over=published.passed_over,
        learned=learned,
        notes=notes,
        sha256=digest,
    )


def _read(path: Path, name: str | None, settings: Path | None, part: str | None) -> tuple[str, Published]:
    """What the reader of the family finds, or the first of all families whose reader takes the file.

    Where none does, the error is of one that knows the names in it, else of the family of the default preset.
    """
    able = [known for known in FAMILIES if family(known).read_published is not None]
    able.sort(key=lambda known: DEFAULT_PRESET not in family(known).presets)
    if name is not None and name in FAMILIES and name not in able:
        raise ConfigError(f"the {name} family reads no published checkpoints; these do: {', '.join(sorted(able))}")
    errors: list[HFlowError] = []
    for known in able if name is None else [name]:
        reader = family(known).read_published
        assert reader is not None
        try:
            return known, reader(path, settings, part)
        except (CheckpointError, ConfigError) as error:
            errors.append(error)
    raise next((error for error in errors if isinstance(error, ConfigError)), errors[0])


def _check_masks(skeleton: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Bound the buffers that are in no file, and so are held against none. Raises `CheckpointError`."""
    stored = skeleton.state_dict().keys()
    masks = sum(buffer.nbytes for name, buffer in skeleton.named_buffers() if name not in stored)
    weights = sum(tensor.nbytes for tensor in state.values())
    most = min(_MOST_MASKS, max(_FEW_MASKS, weights))
    if masks > most:
        raise CheckpointError(
            f"{source} holds {weights:,} bytes of weights, and its settings ask for {masks:,} bytes of masks, "
            f"where at most {most:,} are allowed; give the settings that belong to it"
        )


def _learn(
    model: LatentModel, unknown: Unknown, images: Path, source: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Set what is unknown by the training part of `images`; what is held out measures models, and stays unseen."""
    pixels = open_dataset(images, model.resolution, channels=model.channels)
    training, held_out = pixels.split()
    if len(training) < 2:
        raise DataError(
            f"{unknown.what} need at least 2 images, not {len(training)}; give more "
            f"({images} has {len(pixels)}, {len(held_out)} held out)"
        )
    chosen = training[np.unique(np.linspace(0, len(training) - 1, min(unknown.images, len(training))).astype(int))]
    progress(f"estimating {unknown.what} from {len(chosen)} images")
    batches = np.split(chosen, range(_BATCH, len(chosen), _BATCH))
    count = model.learn(torch.from_numpy(pixels.pixels(batch)) for batch in batches)
    wild = [name for name, scale in model.noise_scales().items() if not math.isfinite(scale.spread)]
    if wild:
        raise CheckpointError(
            f"{source}: noise scales must be finite, and those of {', '.join(wild)} are not on {images}; "
            "its weights overflow, so omit --images or give an intact file"
        )
    about = {"what": unknown.what, "source": str(images), "images": count, "held_out": len(held_out)}
    return about | {"split": pixels.split_by} | ({"not_used": pixels.left_out} if pixels.left_out else {})
