"""What is fed to a model that is measured: other numbers in every round, the same in every process."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hflow_rt.conditions import in_turn
from hflow_rt.manifest import Manifest
from hflow_rt.runtime.noise import draw_latents, draw_noise, parse_std

__all__ = ["inputs_of"]


def inputs_of(manifest: Manifest, graph: str, batch: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Inputs of `graph` by name: latents at the std of the bundle, 8-bit pictures in [0, 1], drawn noise and values."""
    indices = range(batch)
    stds = parse_std(list(manifest.std), manifest.latent_shapes)
    known = draw_latents(manifest.latent_shapes, manifest.prior_std, seed, indices, stds)
    known |= in_turn(manifest.choices, indices)
    found: dict[str, NDArray[np.float32]] = {}
    for tensor in manifest.graphs[graph].inputs:
        if tensor.role == "image":
            found[tensor.name] = _pictures(manifest.resolution, manifest.channels, batch, seed)
        elif tensor.role == "control":
            found[tensor.name] = np.full((batch, *tensor.shape), tensor.default, np.float32)
        elif tensor.name in known:
            found[tensor.name] = known[tensor.name]
        else:
            kind: Literal["noise", "uniform"] = "uniform" if tensor.role == "uniform" else "noise"
            found[tensor.name] = draw_noise(kind, tensor.name, tensor.shape, seed, indices)
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
