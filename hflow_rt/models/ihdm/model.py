"""IHDM: images become sharp by undoing heat flow, level by level (Rissanen, Heinonen & Solin, ICLR 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hflow_rt.models.bins import public_levels
from hflow_rt.models.family import GraphSpec, Loop, LossTerms, Prior, Route, TensorSpec
from hflow_rt.models.ihdm.bank import starts, surviving
from hflow_rt.models.ihdm.blur import Blur
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.graphs import graphs, loops
from hflow_rt.models.ihdm.network import UNet

__all__ = ["IHDM", "levels_of"]


class IHDM(nn.Module):
    """The network and the blur it undoes. Images are `[B, C, R, R]` in [0, 1]; levels int64 `[B]`, 1 to `steps`."""

    starts: Tensor | None

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        self.config = config
        self.network = UNet(config)
        self.blur = Blur(config)
        self.start_shape = (config.channels, len(surviving(config)))
        self.register_buffer("starts", torch.zeros(config.bank, *self.start_shape) if config.bank else None)

    def mean(self, u: Tensor, level: Tensor) -> Tensor:
        """The expected image one level sharper, given `u` at each image's `level`."""
        return u + self.network(u, level)

    # -- what is exported

    @property
    def resolution(self) -> int:
        """Side of the image in pixels."""
        return self.config.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """`start`, the surviving waves; `start_noise` on the image of them; `residual`, see `graphs.py`."""
        shape = self.config.image_shape
        return {"start": self.start_shape, "start_noise": shape, "residual": shape}

    def prior_std(self) -> dict[str, float]:
        """Of each latent at temperature 1; nothing is missing of a sample."""
        return {"start": 1.0, "start_noise": float(self.config.noisy_start), "residual": 0.0}

    def prior(self) -> dict[str, Prior]:
        """Where each latent comes from."""
        noisy: Prior = "normal" if self.config.noisy_start else "unscaled"
        return {"start": "bank", "start_noise": noisy, "residual": "unscaled"}

    def bank(self) -> dict[str, Tensor]:
        """Starts of training images, `[rows, C, M]`; none of a published model, which holds no images."""
        return {} if self.starts is None else {"start": self.starts}

    def graphs(self) -> dict[str, GraphSpec]:
        """See `graphs.py`."""
        return graphs(self)

    def routes(self) -> dict[Route, Loop]:
        """See `graphs.py`."""
        return loops(self)

    # -- training

    def fill_bank(self, pixels: Tensor) -> None:
        """Make the bank of uint8 images `[N, C, R, R]`, as evenly of them as it has rows."""
        if self.starts is not None:
            self.starts.copy_(starts(self.config, pixels, len(self.starts)))

    def draws(self) -> dict[str, TensorSpec]:
        """What one loss draws for every image, by name."""
        return {
            "level": TensorSpec("level", (), "uniform", (0.0, 1.0)),
            "noise": TensorSpec("noise", self.config.image_shape, "noise"),
        }

    def loss(self, images: Tensor, draws: Mapping[str, Tensor]) -> LossTerms:
        """Summed squared error of the mean at a random level of each image; see `draws` (spec 4)."""
        level = levels_of(draws["level"], self.config.trained_levels)
        loss = self.errors(images, level, draws["noise"]).mean()
        return LossTerms(loss, None, {"error": loss.detach()})

    def errors(self, images: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the mean at `level`, summed over each image, `[B]`. noise: standard normal."""
        u = self.blur(images, level) + self.config.sigma * noise
        return (self.blur(images, level - 1) - self.mean(u, level)).square().flatten(1).sum(1)

    def dequantize(self, pixels: Tensor, uniform: Tensor | None = None) -> Tensor:
        """uint8 images to [0, 1]: their levels, or spread over the bins of levels by `uniform` in [0, 1)."""
        if uniform is None:
            return public_levels(pixels, self.config.bits)
        bins = 1 << self.config.bits
        return (pixels // (256 // bins) + uniform) / bins


def levels_of(uniform: Tensor, last: int) -> Tensor:
    """Uniform draws in [0, 1) to levels 1 to `last`, each as likely."""
    return (uniform.double() * last).long().clamp(max=last - 1) + 1
