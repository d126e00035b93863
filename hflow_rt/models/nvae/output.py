"""Distributions of pixels given the head's output (spec 4.2). Images are in [0, 1], `[B, C, H, W]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.logistic_mixture import logistics, mixture_log_prob
from hflow_rt.kernels.mixture_image import MIDDLES, level, mixture_image, of_chosen, whole_steps
from hflow_rt.models.family import TensorSpec
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.normal import Normal, at_least_single

__all__ = ["Bernoulli", "Mixture", "NormalPixels", "Pixels", "draw_specs", "pixels"]

_LOGIT = whole_steps(torch.logit(MIDDLES))  # of the middles of levels


class Pixels(Protocol):
    """A distribution of images."""

    def log_prob(self, image: Tensor) -> Tensor:
        """Nats of every pixel, colours joined, `[B, H, W]`."""

    def mean(self) -> Tensor:
        """The image that stands for all, `[B, C, H, W]`."""

    def at(self, draws: Sequence[Tensor]) -> Tensor:
        """One image, by what `draw_specs` lists."""


def draw_specs(config: NVAEConfig) -> tuple[TensorSpec, ...]:
    """What `Pixels.at` takes, on the image without padding."""
    image = config.image_shape
    if config.output == "normal":
        return (TensorSpec("pixel_noise", image, "noise"),)
    uniform = TensorSpec("pixel_uniform", image, "uniform", (0.0, 1.0))
    if config.output == "bernoulli":
        return (uniform,)
    return TensorSpec("pixel_choice", (config.mixtures, *image[1:]), "uniform", (0.0, 1.0)), uniform


def pixels(config: NVAEConfig, logits: Tensor) -> Pixels:
    """The distribution that the head's output `[B, head_channels, H, W]` stands for."""
    logits = at_least_single(logits)
    if config.output == "mixture":
        return Mixture(logits, config.channels, config.bits, config.likelihood == "published")
    return Bernoulli(logits) if config.output == "bernoulli" else NormalPixels(logits)


class Mixture:
    """Logistic distributions, mixed for each pixel, whose masses in the bins of levels are probabilities.

    logits: as `mixture_log_prob` has them, of 3 channels or 1.
    """

    def __init__(self, logits: Tensor, channels: int = 3, bits: int = 8, published: bool = False) -> None:
        self.logits, self.channels, self.bits, self.published = logits, channels, bits, published

    def log_prob(self, image: Tensor) -> Tensor:
        return mixture_log_prob(self.logits, image, self.bits, self.published)

    def mean(self) -> Tensor:
        return mixture_image(self.logits, self.channels)

    def draw(self, mixture_uniform: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
        """One image. The uniform numbers are in (0, 1): `[B, M, H, W]` choose a logistic for each pixel, `[B, C, H, W]`
        a value of each colour.

        A temperature multiplies scales and sharpens the choice; the published form with one is `draw_divided`.
        """
        return self._draw(mixture_uniform, uniform, temperature, temperature)

    def draw_divided(self, mixture_uniform: Tensor, uniform: Tensor, temperature: float) -> Tensor:
        """As published: lower temperatures make scales larger."""
        return self._draw(mixture_uniform, uniform, temperature, 1 / temperature)

    def _draw(self, mixture_uniform: Tensor, uniform: Tensor, temperature: float, spread: float) -> Tensor:
        gumbel = -(-mixture_uniform.log()).log()
        chosen = (logistics(self.logits, self.channels).weights / temperature + gumbel).argmax(1)
        return of_chosen(self.logits, chosen, spread * (uniform.log() - (-uniform).log1p()), self.channels)

    def at(self, draws: Sequence[Tensor]) -> Tensor:
        choice, uniform = draws
        return mixture_image(self.logits, self.channels, (choice, uniform))


class Bernoulli:
    """Pixels 0 or 1. logits: `[B, 1, H, W]`."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_prob(self, image: Tensor) -> Tensor:
        return (image * self.logits - F.softplus(self.logits)).sum(1)

    def mean(self) -> Tensor:
        """Probabilities of 1."""
        return torch.sigmoid(self.logits)

    def draw(self, uniform: Tensor) -> Tensor:
        """One image, by uniform numbers of its shape."""
        return (uniform < self.mean()).to(self.logits)

    def at(self, draws: Sequence[Tensor]) -> Tensor:
        (uniform,) = draws
        return (_LOGIT.to(uniform.device)[level(uniform)] < whole_steps(self.logits)).to(self.logits)


class NormalPixels:
    """A density on [-1, 1], no masses of levels. logits: C means, then C logarithms of deviations."""

    def __init__(self, logits: Tensor) -> None:
        self.normal = Normal.of_raw(logits)

    def log_prob(self, image: Tensor) -> Tensor:
        return self.by_colour(image).sum(1)

    def by_colour(self, image: Tensor) -> Tensor:
        """Nats of every colour of every pixel."""
        return self.normal.log_prob(2 * image - 1)

    def mean(self) -> Tensor:
        return 0.5 * self.normal.mean.clamp(-1.0, 1.0) + 0.5

    def draw(self, noise: Tensor) -> Tensor:
        """One image, by standard normal noise of its shape."""
        return 0.5 * self.normal.at(noise).clamp(-1.0, 1.0) + 0.5

    def at(self, draws: Sequence[Tensor]) -> Tensor:
        (noise,) = draws
        return self.draw(noise)
