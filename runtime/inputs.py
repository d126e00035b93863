"""What is fed to a model that is measured: other numbers in every round, the same in every process."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hflow_rt.conditions import in_turn
from hflow_rt.manifest import Loop
from hflow_rt.runtime.arrays import given
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.drawing import Drawing
from hflow_rt.runtime.noise import Stream, draw_noise, parse_std

__all__ = ["inputs_of"]


def inputs_of(bundle: Bundle, case: str, batch: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Inputs of a graph, or of a route that is a loop, by name; other numbers for every seed.

    Latents at the std of the bundle, 8-bit pictures in [0, 1], drawn noise and values, the middle row of a schedule.
    """
    manifest, drawing, indices = bundle.manifest, Drawing(bundle), range(batch)
    known = drawing.latents(seed, indices, parse_std(list(manifest.std), drawing.scaled))
    known |= in_turn(manifest.conditions, indices)
    graphs, steps = [manifest.graphs.get(case)], 1
    for route, way in manifest.routes.items():
        if isinstance(way, Loop) and way.step == case:
            known |= {name: table[way.steps // 2][None] for name, table in drawing.table(way.schedule).items()}
        if isinstance(way, Loop) and route == case and graphs == [None]:
            graphs, steps = [manifest.graphs[name] for name in way.graphs], way.steps
    found: dict[str, NDArray[np.float32]] = {}
    for number, graph in enumerate(filter(None, graphs)):
        for tensor in graph.inputs:
            kind: Literal["noise", "uniform"] = "uniform" if tensor.role == "uniform" else "noise"
            if tensor.name in found or (number and tensor.role in ("value", "schedule")):
                continue  # what a loop brings along
            if tensor.role == "image":
                found[tensor.name] = _pictures(manifest.resolution, manifest.channels, batch, seed)
            elif tensor.role in ("noise", "uniform", "value") and number:
                found[tensor.name] = np.asarray(Stream(kind, tensor.name, tensor.shape, seed, indices, steps))
            elif tensor.role in ("noise", "uniform", "value"):
                found[tensor.name] = draw_noise(kind, tensor.name, tensor.shape, seed, indices)
            else:
                found[tensor.name] = given(tensor, known, batch)
    return found


def _pictures(side: int, channels: int, number: int, seed: int) -> NDArray[np.float32]:
    """Bundled emoji, at any size; seed: where to start among them."""
    import zipfile

    from PIL import Image

    from hflow_rt.assets import demo_images

    mode = "L" if channels == 1 else "RGB"
    with zipfile.ZipFile(demo_images()) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("test/"))
        chosen = [names[(seed * 17 + index) % len(names)] for index in range(number)]
        pictures = [Image.open(archive.open(name)).convert("RGB").convert(mode).resize((side, side)) for name in chosen]
    images = np.stack([np.asarray(picture, np.float32).reshape(side, side, channels) for picture in pictures])
    return images.transpose(0, 3, 1, 2).copy() / np.float32(255)
