"""The toy generator, trained against a discriminator: two optimizers, three phases, and state that does not ship."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_generator import ToyConfig, ToyGenerator

from hflow_rt.evaluation.figures import Estimate, Figure
from hflow_rt.models.family import LossTerms, TensorSpec
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan
from hflow_rt.models.registry import Family


class AdversarialConfig(ToyConfig):
    penalty: float = 10.0


class Adversarial(ToyGenerator):
    config: AdversarialConfig

    def plan(self, settings: Any) -> TrainingPlan:
        return AdversarialPlan(self)


class AdversarialPlan(TrainingPlan):
    """`confidence` follows how sure the discriminator is of real images."""

    model: Adversarial
    confidence: Tensor

    def __init__(self, model: Adversarial) -> None:
        super().__init__()
        self.model = model
        pixels = 3 * model.resolution**2
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, 8), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        self.register_buffer("confidence", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("generator", "generator"),
            Phase("discriminator", "discriminator"),
            Phase("penalty", "discriminator", every=2),
        )

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {
            "generator": {"plane": list(self.model.parameters())},
            "discriminator": {"discriminator": list(self.discriminator.parameters())},
        }

    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        return () if phase == "penalty" else (TensorSpec("z", (6,), "noise"),)

    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        real = batch.pixels / 255
        if phase == "penalty":
            real.requires_grad_()
            (slope,) = torch.autograd.grad(self.discriminator(real).sum(), real, create_graph=True)
            size = slope.square().sum((1, 2, 3)).mean()
            return LossTerms(self.model.config.penalty * size, None, {"slope": size.detach()})
        fake = self.discriminator(self.model.decode(batch.draws))
        if phase == "generator":
            return LossTerms(F.softplus(-fake).mean(), None, {})
        with torch.no_grad():
            self.seen += len(real)
        judged = self.discriminator(real)
        sure = judged.detach().tanh().mean()
        return LossTerms((F.softplus(fake) + F.softplus(-judged)).mean(), None, {"sure": sure})

    def after_step(self, terms: Mapping[str, Mapping[str, float]], place: Place) -> None:
        if "discriminator" in terms:
            self.confidence.lerp_(torch.tensor(terms["discriminator"]["sure"]), 0.5)

    def figures(self, average: Any, held_out: Any) -> dict[str, Figure]:
        image = average.decode({"z": torch.zeros(1, 6)}).numpy()[0]
        off = np.abs(held_out / 255 - image).mean((1, 2, 3))
        return {"off": Figure("from the middle of the prior to images", Estimate.of(off))}


TINY: dict[str, Any] = {
    "model": {},
    "training": {
        "batch_size": 4,
        "accumulate": 1,
        "learning_rates": {"plane": 1e-2, "discriminator": 2e-2},
        "optimizers": {"discriminator": {"betas": [0.0, 0.99], "weight_decay": 1e-2}},
        "warmup_images": 0,
        "decay": "cosine",
        "decay_start_images": 4,
        "decay_every_images": 4,
        "decay_end_images": 16,
        "final_rates": {"discriminator": 1e-3},
        "grad_clip": None,
        "ema_half_life_images": 20,
        "ema_ramp": 0.5,
        "ema_warmup_images": 0,
        "init_images": 4,
    },
}

FAMILY = Family(
    "toy-adversarial", "a toy with a discriminator", AdversarialConfig, {"toy-adversarial": TINY}, TINY, Adversarial
)
