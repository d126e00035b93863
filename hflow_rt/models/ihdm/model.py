"""IHDM: images become sharp by undoing heat flow, level by level (Rissanen, Heinonen & Solin, ICLR 2023)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hflow_rt.models.bins import public_levels
from hflow_rt.models.family import LossTerms, TensorSpec
from hflow_rt.models.ihdm.blur import Blur
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.network import UNet

__all__ = ["IHDM", "levels_of"]


class IHDM(nn.Module):
    """The network and the blur it undoes. Images are `[B, C, R, R]` in [0, 1]; levels int64 `[B]`, 1 to `steps`."""

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        self.config = config
        self.network = UNet(config)
        self.blur = Blur(config)

    def mean(self, u: Tensor, level: Tensor) -> Tensor:
        """The expected image one level sharper, given `u` at each image's `level`."""
        return u + self.network(u, level)

    # -- training

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
