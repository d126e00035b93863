"""What is fed to a model that is measured: other numbers in every round, the same in every process."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hflow_rt.conditions import in_turn
from hflow_rt.manifest import Loop
from hflow_rt.runtime.arrays import given
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.drawing import Drawing
from hflow_rt.runtime.noise import draw_noise, parse_std

__all__ = ["inputs_of"]


def inputs_of(bundle: Bundle, graph: str, batch: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Inputs of `graph` by name: latents at the std of the bundle, 8-bit pictures in [0, 1], drawn noise and values.

    Other numbers for every seed, the same in every process.
    """
    manifest, drawing, indices = bundle.manifest, Drawing(bundle), range(batch)
    known = drawing.latents(seed, indices, parse_std(list(manifest.std), drawing.scaled))
    known |= in_turn(manifest.choices, indices)
    for way in manifest.routes.values():
        if isinstance(way, Loop) and way.step == graph:
            known |= {name: table[way.steps // 2][None] for name, table in drawing.table(way.schedule).items()}
    found: dict[str, NDArray[np.float32]] = {}
    for tensor in manifest.graphs[graph].inputs:
        if tensor.role == "image":
            found[tensor.name] = _pictures(manifest.resolution, batch, seed)
        elif tensor.role in ("noise", "uniform", "value"):
            kind: Literal["noise", "uniform"] = "uniform" if tensor.role == "uniform" else "noise"
            found[tensor.name] = draw_noise(kind, tensor.name, tensor.shape, seed, indices)
        else:
            found[tensor.name] = given(tensor, known, batch)
    return found


def _pictures(side: int, number: int, seed: int) -> NDArray[np.float32]:
    """Bundled emoji, at any size; seed: where to start among them."""
    import zipfile

    from PIL import Image

    from hflow_rt.assets import demo_images

    with zipfile.ZipFile(demo_images()) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("test/"))
        chosen = [names[(seed * 17 + index) % len(names)] for index in range(number)]
        pictures = [Image.open(archive.open(name)).convert("RGB").resize((side, side)) for name in chosen]
    return np.stack([np.asarray(picture, np.float32) for picture in pictures]).transpose(
        0, 3, 1, 2
    ).copy() / np.float32(255)
