"""How INR-GAN is trained: generator, discriminator, and penalties every so many steps (spec sections 6 and 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hflow_rt.models.family import LossTerms, TensorSpec
from hflow_rt.models.inrgan.augment import PIPES, Augmenter
from hflow_rt.models.inrgan.discriminator import Discriminator
from hflow_rt.models.inrgan.losses import generator_loss, judged_loss, path_lengths, slope
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan

if TYPE_CHECKING:
    from hflow_rt.models.inrgan.model import INRGAN

__all__ = ["INRGANPlan", "adapted", "mixed"]

GENERATOR, DISCRIMINATOR, PATH, PENALTY = "generator", "discriminator", "path", "penalty"
_PATH_DECAY = 0.01
_WON = 0.1  # loss of a discriminator, over thousands of images, at which a generator learns nothing: 2 ln 2 is even


class INRGANPlan(TrainingPlan):
    """The generator is to be taken for real; the discriminator is to tell, and to be smooth at real images.

    Labels of generated images are those of the real ones of the step. What the discriminator sees is augmented with
    probability `p`, which grows while it is too sure of real images.
    """

    model: INRGAN
    path_mean: Tensor
    p: Tensor
    window: Tensor

    def __init__(self, model: INRGAN) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.discriminator = Discriminator(config)
        names = PIPES[config.augment]
        self.augmenter = Augmenter(names, config.channels, config.resolution) if names else None
        if config.path_weight:
            self.register_buffer("path_mean", torch.zeros(()))
        if names:
            self.register_buffer("p", torch.tensor(config.augment_start))
            # sum of the mean signs of logits at real images, their count, images seen before, since p changed
            self.register_buffer("window", torch.zeros(3, dtype=torch.float64))

    def phases(self) -> tuple[Phase, ...]:
        config = self.model.config
        return (
            Phase(GENERATOR, GENERATOR),
            *([Phase(PATH, GENERATOR, every=config.path_every)] if config.path_weight else []),
            Phase(DISCRIMINATOR, DISCRIMINATOR),
            Phase(PENALTY, DISCRIMINATOR, every=config.r1_every),
        )

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {
            GENERATOR: {GENERATOR: list(self.model.parameters())},
            DISCRIMINATOR: {DISCRIMINATOR: list(self.discriminator.parameters())},
        }

    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        config = self.model.config
        z = TensorSpec("z", (config.z_dim,), "noise")
        second = (TensorSpec("z2", z.shape, "noise"), TensorSpec("mix", (2,), "uniform", (0.0, 1.0)))
        latents = () if phase == PENALTY else (z, *(second if config.style_mixing else ()))
        if phase == PATH:
            image = (config.channels, config.resolution, config.resolution)
            return (*latents, TensorSpec("direction", image, "noise"))
        if self.augmenter is None:
            return latents
        seen = {GENERATOR: ("fake",), DISCRIMINATOR: ("fake", "real"), PENALTY: ("real",)}[phase]
        specs = self.augmenter.draws()
        return (*latents, *(replace(spec, name=f"{kind}_{spec.name}") for kind in seen for spec in specs))

    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        """A phase that does not take part in every step has the weight of the steps it stands for."""
        config = self.model.config
        if phase == GENERATOR:
            losses, terms = self.generator_losses(batch)
            return LossTerms(losses.mean(), None, terms)
        if phase == DISCRIMINATOR:
            losses, terms = self.discriminator_losses(batch)
            return LossTerms(losses.mean(), None, terms)
        if phase == PATH:
            uneven = self.path_losses(batch).mean()
            loss = config.path_weight * config.path_every * uneven
            return LossTerms(loss, None, {"uneven": uneven.detach(), "path": self.path_mean.clone()})
        slopes, terms = self.slopes(batch)
        return LossTerms(config.r1_gamma / 2 * config.r1_every * slopes.mean(), None, terms)

    def generator_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[B]`, and how many images pass for real."""
        logits = self._judged("fake", self.model.synthesis(self.styles(batch)), batch)
        return generator_loss(logits), {"fooled": _positive(logits)}

    def discriminator_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[B]` of generated and real images in turn, and how many of each are taken for real."""
        with torch.no_grad():
            images = self.model.synthesis(self.styles(batch))
        fake, real = self._judged("fake", images, batch), self._judged("real", self._real(batch), batch)
        terms = {"real": _positive(real), "fake": _positive(fake), "sign": real.detach().sign().mean()}
        return judged_loss(fake, real), terms | ({} if self.augmenter is None else {"p": self.p.clone()})

    def path_losses(self, batch: Batch) -> Tensor:
        """`[B // 2]`, or of a single image; moves the running mean of lengths, of which it is the squared distance."""
        count = max(len(batch.pixels) // 2, 1)
        draws, conditions = (
            {name: value[:count] for name, value in values.items()} for values in (batch.draws, batch.conditions)
        )
        half = Batch(batch.pixels[:count], draws, conditions)
        lengths = path_lengths(self.model.synthesis, self.styles(half), half.draws["direction"])
        mean = self.path_mean.lerp(lengths.mean(), _PATH_DECAY)
        self.path_mean.copy_(mean.detach())
        return (lengths - mean).square()

    def slopes(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared norms `[B]` of the gradient by real images, through their augmentation."""
        judged: list[Tensor] = []

        def judge(images: Tensor) -> Tensor:
            judged.append(self._judged("real", images, batch))
            return judged[-1]

        found = slope(judge, self._real(batch))
        terms = {"slope": found.detach().mean(), "sign": judged[0].detach().sign().mean()}
        # biases that the slope does not depend on get a gradient of zero, so that Adam counts the step for all alike
        return found + 0 * judged[0], terms

    def after_step(self, terms: Mapping[str, Mapping[str, float]], place: Place) -> None:
        if self.augmenter is None:
            return
        config = self.model.config
        signs = [found["sign"] for found in terms.values() if "sign" in found]
        self.window[:2] += torch.tensor([sum(signs), len(signs)], dtype=self.window.dtype, device=self.window.device)
        if place.step % config.augment_every == 0:
            total, count, before = self.window.tolist()
            step = (place.images - before) / config.augment_images
            self.p.copy_(adapted(self.p, total / max(count, 1), config.augment_target, step))
            self.window.copy_(torch.tensor([0.0, 0.0, place.images]))

    def warning(self, means: Mapping[str, float]) -> str | None:
        loss = means.get(f"{DISCRIMINATOR}/loss", math.inf)
        most = self.augmenter is not None and bool(self.p >= 1)
        if loss >= _WON and not most:
            return None
        seen = [f"its loss is {loss:.2g}, where 1.39 is even"] if loss < _WON else []
        seen += ["augmentation is at its most, p = 1, and does not suffice"] if most else []
        more = "" if self.augmenter is not None else "start again from these weights with model.augment=bgc (--from), "
        return (
            f"the discriminator wins: {', and '.join(seen)}; images get no better so: {more}raise model.r1_gamma ="
            f" {self.model.config.r1_gamma:g}, lower training.learning_rates.{DISCRIMINATOR}, or give more images"
        )

    def styles(self, batch: Batch) -> Tensor:
        """One w a slot, of one z or of two, `[B, S, W]`; the first moves the running mean of w."""
        config, labels, draws = self.model.config, self.model.labels(batch.conditions), batch.draws
        w = self.model.mapping(draws["z"], labels)
        self.model.follow(w.detach())
        styles = self.model.slots(w)
        if not config.style_mixing:
            return styles
        # the same for all images of a micro-batch: whether, and from which slot on
        chance, where = draws["mix"][0].tolist()
        first = 1 + int(where * (config.slots - 1)) if chance < config.style_mixing else config.slots
        return mixed(styles, self.model.slots(self.model.mapping(draws["z2"], labels)), first)

    def _real(self, batch: Batch) -> Tensor:
        """In [-1, 1], in the type of the weights."""
        bins = 1 << self.model.config.bits
        levels = (batch.pixels // (256 // bins)).to(self.discriminator.out.weight.dtype)
        return levels * (2 / (bins - 1)) - 1

    def _judged(self, kind: str, images: Tensor, batch: Batch) -> Tensor:
        """Logits `[B]` of augmented images; kind: fake or real."""
        if self.augmenter is not None:
            own = {spec.name: batch.draws[f"{kind}_{spec.name}"] for spec in self.augmenter.draws()}
            images = self.augmenter(images, self.p, own)
        logits: Tensor = self.discriminator(images, self.model.labels(batch.conditions))
        return logits


def adapted(p: Tensor, sign: float, target: float, step: float) -> Tensor:
    """The probability of augmentation after a window: a step up where the mean sign is above the target, else down."""
    return (p + math.copysign(step, sign - target) * (sign != target)).clamp(min=0)


def mixed(w: Tensor, other: Tensor, first: int) -> Tensor:
    """w `[B, S, W]` in the slots before `first`, then the other."""
    return torch.cat([w[:, :first], other[:, first:]], 1)


def _positive(logits: Tensor) -> Tensor:
    """How many of them say that an image is real."""
    return (logits.detach() > 0).float().mean()
