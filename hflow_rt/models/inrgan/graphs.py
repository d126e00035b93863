"""The graphs of INR-GAN: z to the image, z to the space of w, and from one w a slot to the image."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hflow_rt.models.family import GraphSpec, TensorSpec
from hflow_rt.models.inrgan.folded import FoldedForward, FoldedMapping, FoldedSynthesis

if TYPE_CHECKING:
    from hflow_rt.models.inrgan.model import INRGAN

__all__ = ["graphs"]

LARGEST_PSI = 2.0


class _Whole(nn.Module):
    """Of the model as it trains: an image in [0, 1] of z."""

    def __init__(self, model: INRGAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, psi: Tensor, cutoff: Tensor, labels: Tensor | None = None) -> tuple[Tensor]:
        w = self.model.slots(self.model.mapping(z, labels))
        return (self.model.public(w, psi, cutoff),)


class _Mapping(_Whole):
    def forward(self, z: Tensor, labels: Tensor | None = None) -> tuple[Tensor]:  # type: ignore[override]
        return (self.model.slots(self.model.mapping(z, labels)),)


class _Synthesis(_Whole):
    def forward(self, w: Tensor, psi: Tensor, cutoff: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (self.model.public(w, psi, cutoff),)


def graphs(model: INRGAN) -> dict[str, GraphSpec]:
    """Folded graphs by name."""
    config = model.config
    image = TensorSpec("image", (config.channels, model.resolution, model.resolution), "image", (0.0, 1.0))
    z, w = TensorSpec("z", (config.z_dim,), "latent"), TensorSpec("w", (config.slots, config.w_dim), "value")
    psi = TensorSpec("psi", (), "control", (0.0, LARGEST_PSI), default=config.psi)
    cutoff = TensorSpec("cutoff", (), "control", (0.0, float(config.slots)), default=float(config.slots))
    labels = tuple(TensorSpec(name, (len(options),), "condition") for name, options in model.conditions().items())
    exact = copy.deepcopy(model).double().eval().requires_grad_(False)
    made: dict[str, tuple[nn.Module, nn.Module, tuple[TensorSpec, ...], TensorSpec]] = {
        "forward": (FoldedForward(exact), _Whole(model), (z, psi, cutoff, *labels), image),
        "mapping": (FoldedMapping(exact.mapping, config.slots), _Mapping(model), (z, *labels), w),
        "synthesis": (FoldedSynthesis(exact), _Synthesis(model), (w, psi, cutoff), image),
    }
    return {
        name: GraphSpec(name, module.float().eval().requires_grad_(False), reference, inputs, (output,))
        for name, (module, reference, inputs, output) in made.items()
    }
