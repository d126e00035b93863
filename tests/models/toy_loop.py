"""A family of many steps each way: a table for its prior, fresh noise and a row of a schedule in every call."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from hflow_rt.models.family import GraphSpec, LatentModel, Loop, LossTerms, TensorSpec
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan
from hflow_rt.models.registry import Family, ModelConfig

STEPS, COARSE, ROWS = 4, 2, 12
# how far each call goes from where it is to the image, when the noise that leads there is read off
TOWARDS = np.linspace(0.4, 1.0, STEPS, dtype=np.float32)


class ToyConfig(ModelConfig):
    resolution: int = 8


class ToyLoop(LatentModel):
    """Coarse colours, sharpened in four steps: u <- u + tanh(conv u + level) / 2 + delta noise."""

    config: ToyConfig
    bank_rows: Tensor

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.levels = nn.Parameter(torch.linspace(-0.3, 0.3, 3 * STEPS).reshape(STEPS, 3))
        self.register_buffer("bank_rows", torch.full((ROWS, 3, COARSE, COARSE), 0.5))

    resolution = property(lambda self: self.config.resolution)

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"start": (3, COARSE, COARSE)}

    def prior_std(self) -> dict[str, float]:
        return {"start": 1.0}

    def prior(self) -> dict[str, Any]:
        return {"start": "bank"}

    def bank(self) -> dict[str, Tensor]:
        return {"start": self.bank_rows}

    def coarse(self, images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images, COARSE)

    def fine(self, start: Tensor) -> Tensor:
        return interpolate(start, scale_factor=float(self.resolution // COARSE))

    def mean(self, u: Tensor, level: Tensor) -> Tensor:
        return u + 0.5 * (self.conv(u) + level[:, :, None, None]).tanh()

    def plan(self, settings: Any) -> "ToyPlan":
        return ToyPlan(self)

    def routes(self) -> dict[Any, Any]:
        levels = {"level": self.levels.detach().numpy()}
        towards = {"towards": TOWARDS}
        return {
            "forward": Loop("begin", "sharpen", levels, {"u_next": "u"}, last=("image",)),
            "inverse": Loop("blur", "read", levels | towards, {"u_next": "u"}, every={"z": "noise"}),
        }

    def graphs(self) -> dict[str, GraphSpec]:
        picture = (3, self.resolution, self.resolution)
        image, start = (
            TensorSpec("image", picture, "image", (0.0, 1.0)),
            TensorSpec("start", (3, COARSE, COARSE), "latent"),
        )
        u, u_next, z = (TensorSpec(name, picture, "value") for name in ("u", "u_next", "z"))
        noise = TensorSpec("noise", picture, "noise")
        level, towards = TensorSpec("level", (3,), "schedule"), TensorSpec("towards", (), "schedule")
        delta = TensorSpec("delta", (), "control", (0.01, 1.0), default=0.1)
        made = [
            (Begin(self), (start,), (u_next,)),
            (Sharpen(self), (u, noise, level, delta), (u_next, image)),
            (Blur(self), (image,), (u_next, start)),
            (Read(self), (u, image, level, towards, delta), (u_next, z)),
        ]
        names = ("begin", "sharpen", "blur", "read")
        return {
            name: GraphSpec(name, module, module, inputs, outputs)
            for name, (module, inputs, outputs) in zip(names, made, strict=True)
        }


class ToyPlan(TrainingPlan):
    """Every call is to lead to the image; the bank is made of the first images."""

    model: ToyLoop

    def __init__(self, model: ToyLoop) -> None:
        super().__init__()
        self.model = model

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("sharpen", "net"),)

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {"net": {"net": list(self.model.parameters())}}

    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        return (TensorSpec("call", (), "uniform"),)

    def start(self, pixels: Tensor, generator: torch.Generator) -> None:
        self.model.bank_rows.copy_(self.model.coarse(pixels[torch.arange(ROWS) % len(pixels)] / 255))

    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        images = batch.pixels / 255
        levels = self.model.levels[(STEPS * batch.draws["call"]).long()]
        error = (self.model.mean(self.model.fine(self.model.coarse(images)), levels) - images).square().mean()
        return LossTerms(error, None, {"error": error.detach()})


class _Part(nn.Module):
    def __init__(self, model: ToyLoop) -> None:
        super().__init__()
        self.model = model


class Begin(_Part):
    def forward(self, start: Tensor) -> tuple[Tensor]:
        return (self.model.fine(start),)


class Sharpen(_Part):
    def forward(self, u: Tensor, noise: Tensor, level: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        u = self.model.mean(u, level) + delta[:, None, None, None] * noise
        return u, u.clamp(0, 1)


class Blur(_Part):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        start = self.model.coarse(image)
        return self.model.fine(start), start


class Read(_Part):
    def forward(self, u: Tensor, image: Tensor, level: Tensor, towards: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        u_next = u + towards[:, None, None, None] * (image - u)
        return u_next, (u_next - self.model.mean(u, level)) / delta[:, None, None, None]


TINY: dict[str, Any] = {
    "model": {},
    "training": {"batch_size": 4, "accumulate": 1, "learning_rates": {"net": 1e-2}, "init_images": 8},
}

FAMILY = Family("toy-loop", "a toy of many steps", ToyConfig, {"toy-loop": TINY}, TINY, ToyLoop)
