"""How NVAE is trained: one phase, with vectors for the spectral regularisation beside the model (spec 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hflow_rt.models.bins import public_levels
from hflow_rt.models.family import LossTerms, TensorSpec
from hflow_rt.models.nvae.graphs import noise_specs
from hflow_rt.models.nvae.network import unpacked
from hflow_rt.models.nvae.objective import (
    bits_per_dim,
    kl_weight,
    training_cost,
    weight_penalty,
)
from hflow_rt.models.nvae.regularisers import (
    FIRST_ROUNDS,
    ROUNDS,
    Shape,
    by_shape,
    gain_penalty,
    singular_values,
    unit,
)
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan

if TYPE_CHECKING:
    from hflow_rt.models.nvae.model import NVAE

__all__ = ["NVAEPlan"]

_NETWORK = "network"


class NVAEPlan(TrainingPlan):
    """The evidence bound, whose divergences are weak at first, and small weights."""

    model: NVAE

    def __init__(self, model: NVAE) -> None:
        super().__init__()
        self.model = model
        for shape, convs in by_shape(model).items():
            self.register_buffer(_name(shape), torch.zeros(len(convs), shape[0]))

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(_NETWORK, _NETWORK),)

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {_NETWORK: {_NETWORK: list(self.model.parameters())}}

    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        config = self.model.config
        binary = [TensorSpec("uniform", config.image_shape, "uniform")] if config.output == "bernoulli" else []
        return (*binary, *noise_specs(config))

    def start(self, pixels: Tensor, generator: torch.Generator) -> None:
        """Random directions, from which power iteration starts."""
        for shape in by_shape(self.model):
            left = self.get_buffer(_name(shape))
            left.copy_(unit(torch.randn(left.shape, generator=generator)))

    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        """Nats of an image, and the penalties of weights."""
        model, config = self.model, self.model.config
        canvas = model.pad(self._images(batch))
        noise = unpacked(config, "noise", batch.draws)
        inferred = model.infer(model.bottom_up(canvas), noise)
        weight = kl_weight(config, place.images, place.total)
        cost = training_cost(model, inferred, canvas, weight)
        spectral = self._spectral(FIRST_ROUNDS if place.step == 0 else ROUNDS)
        gains = gain_penalty(model)
        penalty = weight_penalty(config, weight) * (spectral + gains)
        bits = bits_per_dim(config, (cost.reconstruction + cost.divergences.sum(1)).mean())
        terms = {
            "reconstruction": cost.reconstruction.mean(),
            "divergence": cost.divergences.sum(1).mean(),
            "spectral": spectral,
            "gains": gains,
        }
        return LossTerms(
            (cost.reconstruction + cost.balanced).mean() + penalty,
            bits.detach() if model.bounds() else None,
            {name: value.detach() for name, value in terms.items()},
        )

    def remedies(self) -> tuple[str, ...]:
        """Those that the authors recommend."""
        config = self.model.config
        higher = f"a higher model.weight_penalty (now {config.weight_penalty:g})"
        if config.weight_penalty_start is None:
            return higher, "one that starts high (model.weight_penalty_start=1)"
        return higher, f"a higher model.weight_penalty_start (now {config.weight_penalty_start:g})"

    def _images(self, batch: Batch) -> Tensor:
        """In [0, 1] at levels; binary ones are drawn anew every time, by how bright the pixels are."""
        if "uniform" in batch.draws:
            images = batch.draws["uniform"] < batch.pixels / 255
        else:
            images = public_levels(batch.pixels, self.model.config.bits)
        return images.to(self.model.top.dtype)

    def _spectral(self, rounds: int) -> Tensor:
        """The sum of the largest singular values; moves the vectors."""
        convs = by_shape(self.model)
        buffers = {shape: self.get_buffer(_name(shape)) for shape in convs}
        with torch.autocast(self.model.top.device.type, enabled=False):  # vectors of a half type do not converge
            values, moved = singular_values(convs, buffers, rounds)
        for shape, left in moved.items():
            buffers[shape].copy_(left)
        return torch.cat(list(values.values())).sum()


def _name(shape: Shape) -> str:
    return f"left_{shape[0]}x{shape[1]}"
