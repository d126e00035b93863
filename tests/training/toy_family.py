"""A family small enough to train in milliseconds: an affine flow over 8x8 images given a two-number code."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hflow_rt.errors import ConfigError
from hflow_rt.models.family import Bound, GraphSpec, LossTerms
from hflow_rt.models.flow import FlowModel, InversePass
from hflow_rt.models.flow_graphs import flow_graphs
from hflow_rt.models.registry import Family, ModelConfig

SIDE = 8
PIXELS = 3 * SIDE * SIDE


class ToyConfig(ModelConfig):
    resolution: int = SIDE
    hidden: int = 4
    strict: bool = True
    bits: int = 8


class ToyFlow(FlowModel):
    """x given code y: z0 = (x - shift(y)) / scale; y: a Gaussian of learned mean."""

    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(PIXELS, 2)
        self.decoder = nn.Sequential(nn.Linear(2, config.hidden), nn.Tanh(), nn.Linear(config.hidden, 3))
        self.log_scale = nn.Parameter(torch.zeros(3, 1, 1))
        self.mean = nn.Parameter(torch.zeros(2))
        self.register_buffer("spread", torch.ones(()))

    @property
    def resolution(self) -> int:
        return self.config.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"z1": (2,), "z0": (3, SIDE, SIDE)}

    def prior_std(self) -> dict[str, float]:
        return {"z1": 1.0, "z0": 1.0}

    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        shift = self.decoder(latents["z1"] + self.mean)[:, :, None, None]
        return (latents["z0"] * self.log_scale.exp() + shift + 0.5).clamp(0, 1)

    def encode(self, images: Tensor, conditions: Any = None) -> InversePass:
        raise NotImplementedError

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"z1.flow": (2,)}

    def _bits(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        y = self.encoder(x.flatten(1))
        if self.training:
            with torch.no_grad():
                self.spread.lerp_(y.std().float(), 0.1)
        y = y + 0.1 * self.spread * noise
        z0 = (x - self.decoder(y)[:, :, None, None]) * (-self.log_scale).exp()
        normal = [0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) for z in (z0, y - self.mean)]
        level0 = normal[0] + self.log_scale.sum() * SIDE * SIDE
        return {"level0": level0 / (PIXELS * math.log(2)), "level1": normal[1] / (PIXELS * math.log(2))}

    def loss(self, images: Tensor, noise: Any = None, conditions: Any = None) -> LossTerms:
        assert noise is not None
        terms = self._bits(images, noise["z1.flow"])
        total = torch.stack(list(terms.values())).sum(0).mean()
        return LossTerms(total, total.detach() + 8, {k: v.mean().detach() for k, v in terms.items()})

    def bounds(self) -> dict[str, Bound]:
        return {"strict": Bound("strict bound", "upper"), "paper": Bound("paper's bound", "published")}

    def bound_inputs(
        self, bound: str, pixels: Tensor, generator: torch.Generator, conditions: Any = None
    ) -> dict[str, Tensor]:
        if bound == "strict" and not self.config.strict:
            raise ConfigError("z1 has no posterior noise")
        noise = torch.randn(len(pixels), 2, generator=generator)
        return {"x": self.dequantize(pixels, generator), "z1.flow": noise}

    def bound_terms(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = self._bits(inputs["x"], inputs["z1.flow"])
        return {"image.bits": torch.stack(list(terms.values())).sum(0) + 8}

    def initialize(self, pixels: Tensor, generator: torch.Generator) -> None:
        x = self.dequantize(pixels, generator)
        with torch.no_grad():
            self.log_scale.copy_(x.std((0, 2, 3)).log()[:, None, None])

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {
            "encoders": list(self.encoder.parameters()),
            "decoders": list(self.decoder.parameters()),
            "flows": [self.log_scale, self.mean],
        }

    def graphs(self) -> dict[str, GraphSpec]:
        return flow_graphs(self, self)

    def folded(self) -> "FlowModel":
        return self


TRAINING: dict[str, Any] = {
    "batch_size": 4,
    "accumulate": 2,
    "images": 320,
    "learning_rates": {"encoders": 1e-3, "decoders": 2e-3, "flows": 5e-3},
    "decay_start_images": 80,
    "decay_every_images": 80,
    "decay_factors": {"encoders": 0.5, "flows": 0.9},
    "cut_images": {"encoders": 240},
    "ema_weight": 0.1,
    "ema_warmup_images": 40,
    "init_images": 8,
    "evaluate_images": 6,
    "log_every": 3,
    "sample_every_images": 1000,
    "evaluate_every_images": 1000,
    "checkpoint_every_images": 1000,
}

PRESETS = {
    "toy": {"model": {}, "training": TRAINING},
    "toy-wide": {"model": {"hidden": 6}, "training": TRAINING},
    "toy-loose": {"model": {"strict": False}, "training": TRAINING},
}

FAMILY = Family("toy", "a toy", ToyConfig, PRESETS, PRESETS["toy"], ToyFlow)
