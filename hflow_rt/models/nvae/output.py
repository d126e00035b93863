"""Distributions of pixels given the head's output (spec 4.2). Images are in [0, 1], `[B, C, H, W]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.models.family import TensorSpec
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.normal import Normal, at_least_single

__all__ = ["Bernoulli", "Mixture", "NormalPixels", "Pixels", "draw_specs", "pixels"]

_SMALLEST_LOG_SCALE = -7.0
_BOTTOM, _PUBLISHED_TOP = -0.999, 0.99  # in [-1, 1], where edge levels begin
_PUBLISHED_LOG_MASS = math.log(1e-5)  # below it the published form takes the density at the middle


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

    logits: `[B, M (1 + 3 C) (3 C: 9), H, W]`: M weights, then for each colour M means, M logarithms of scales and, of
    colour images, M coefficients by which a colour's mean depends on colours before it.
    """

    def __init__(self, logits: Tensor, channels: int = 3, bits: int = 8, published: bool = False) -> None:
        kinds = 3 if channels == 3 else 2
        count = logits.shape[1] // (1 + kinds * channels)
        self.weights = logits[:, :count]
        parameters = torch.unflatten(logits[:, count:], 1, (channels, kinds, count))
        self.means = parameters[:, :, 0]  # [B, C, M, H, W]
        self.log_scales = parameters[:, :, 1].clamp(min=_SMALLEST_LOG_SCALE)
        # green by red, blue by red, blue by green
        self.coefficients = parameters[:, :, 2].tanh() if channels == 3 else None
        self.half_bin = 1 / (2**bits - 1)  # in [-1, 1]
        self.published = published

    def log_prob(self, image: Tensor) -> Tensor:
        y = 2 * image - 1
        by_colour = self._log_masses(y[:, :, None], self._conditional_means(y))
        return torch.logsumexp(by_colour.sum(1) + F.log_softmax(self.weights, 1), 1)

    def _conditional_means(self, y: Tensor) -> Tensor:
        """Means `[B, C, M, H, W]` given the colours before, true values."""
        if self.coefficients is None:
            return self.means
        red, green = y[:, :1], y[:, 1:2]
        k = self.coefficients.unbind(1)
        means = self.means.unbind(1)
        return torch.stack((means[0], means[1] + k[0] * red, means[2] + k[1] * red + k[2] * green), 1)

    def _log_masses(self, y: Tensor, means: Tensor) -> Tensor:
        """Logarithm of the mass of each level under each logistic."""
        sharpness = (-self.log_scales).exp()
        middle = sharpness * (y - means)
        upper, lower = middle + sharpness * self.half_bin, middle - sharpness * self.half_bin
        # sigmoid(upper) - sigmoid(lower) without cancellation
        mass = -F.softplus(-upper) - F.softplus(lower) + (-torch.expm1(-2 * self.half_bin * sharpness)).log()
        if self.published:
            density = middle - self.log_scales - 2 * F.softplus(middle) + math.log(2 * self.half_bin)
            mass = torch.where(mass > _PUBLISHED_LOG_MASS, mass, density)
        top = _PUBLISHED_TOP if self.published else 1 - self.half_bin
        edges = torch.where(y > top, -F.softplus(lower), mass)
        return torch.where(y < _BOTTOM, -F.softplus(-upper), edges)

    def mean(self) -> Tensor:
        weights = F.softmax(self.weights, 1)[:, None]
        coefficients = None if self.coefficients is None else (weights * self.coefficients).sum(2)
        return _in_turn((weights * self.means).sum(2), coefficients)

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
        return self._of((self.weights / temperature + gumbel).argmax(1), uniform, spread)

    def at(self, draws: Sequence[Tensor]) -> Tensor:
        choice, uniform = draws
        scores = _steps(self.weights) + _GUMBEL.to(choice.device)[_level(choice)]
        return self._of(scores.argmax(1), _inside(uniform), 1.0)

    def _of(self, chosen: Tensor, uniform: Tensor, spread: float) -> Tensor:
        """Of the logistic that was `chosen` for each pixel, `[B, H, W]`."""
        chosen = chosen[:, None, None].expand(*uniform.shape[:2], 1, -1, -1)

        def of(values: Tensor) -> Tensor:
            return values.gather(2, chosen[:, : values.shape[1]]).squeeze(2)

        logistic = uniform.log() - (-uniform).log1p()
        values = of(self.means) + spread * of(self.log_scales).exp() * logistic
        return _in_turn(values, None if self.coefficients is None else of(self.coefficients))


def _in_turn(values: Tensor, coefficients: Tensor | None) -> Tensor:
    """Colours `[B, C, H, W]` in [-1, 1], each clipped before the next depends on it, as an image."""
    if coefficients is None:
        y = values.clamp(-1.0, 1.0)
    else:
        k = coefficients.unbind(1)
        red, green, blue = values.unbind(1)
        red = red.clamp(-1.0, 1.0)
        green = (green + k[0] * red).clamp(-1.0, 1.0)
        blue = (blue + k[1] * red + k[2] * green).clamp(-1.0, 1.0)
        y = torch.stack((red, green, blue), 1)
    return 0.5 * y + 0.5


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
        return (_LOGIT.to(uniform.device)[_level(uniform)] < _steps(self.logits)).to(self.logits)


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


# A choice by rounded numbers would turn on the last bit of a logarithm, and pixels would differ from one engine to the
# next. What is compared is therefore a multiple of a small step, of which every arithmetic makes the same sums: draws
# are one of so many levels, whose logarithms are constants, and logits move by less than half a step.
_LEVELS, _STEP = 1 << 16, 1 / 1024


def _level(uniform: Tensor) -> Tensor:
    """Numbers in [0, 1) as one of `_LEVELS`."""
    return (uniform * _LEVELS).floor().clamp(0, _LEVELS - 1).long()


def _steps(values: Tensor) -> Tensor:
    """In whole steps."""
    return (values.float() / _STEP).round()


_MIDDLES = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
_GUMBEL, _LOGIT = _steps(-(-_MIDDLES.log()).log()), _steps(torch.logit(_MIDDLES))


def _inside(uniform: Tensor) -> Tensor:
    """Numbers in [0, 1) moved into the published range, which has neither end."""
    return 1e-5 + (1 - 2e-5) * uniform
