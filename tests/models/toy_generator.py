"""A family without what flows take for granted: no inverse, no likelihood, noise and a control beside the latent."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hflow_rt.errors import NoInverse
from hflow_rt.models.family import Encoding, Family, GraphSpec, LatentModel, LossTerms, ModelConfig, TensorSpec
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan

NO_INVERSE = "a toy generator maps latents to images only"


class ToyConfig(ModelConfig):
    resolution: int = 8


class ToyGenerator(LatentModel):
    """z to an image: a plane of colours, `contrast` around grey, with `dither` of a twentieth."""

    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.plane = nn.Linear(6, 3 * config.resolution**2)

    @property
    def resolution(self) -> int:
        return self.config.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"z": (6,)}

    def prior_std(self) -> dict[str, float]:
        return {"z": 1.0}

    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        z = latents["z"]
        image = self.plane(z).tanh().unflatten(1, (3, self.resolution, self.resolution))
        if "contrast" in latents:
            image = image * latents["contrast"][:, None, None, None]
        if "dither" in latents:
            image = image + 0.1 * (latents["dither"] - 0.5)
        return (0.5 + 0.5 * image).clamp(0, 1)

    def encode(self, images: Tensor, conditions: Any = None) -> Encoding:
        raise NoInverse(NO_INVERSE)

    def plan(self, settings: Any) -> TrainingPlan:
        return ToyPlan(self)

    def routes(self) -> dict[str, str]:
        return {"forward": "generate"}

    def absent(self) -> dict[str, str]:
        return {"inverse": NO_INVERSE}

    def graphs(self) -> dict[str, GraphSpec]:
        image = TensorSpec("image", (3, self.resolution, self.resolution), "image", (0.0, 1.0))
        inputs = (
            TensorSpec("z", (6,), "latent"),
            TensorSpec("contrast", (), "control", (0.0, 1.0), default=0.8),
            TensorSpec("dither", image.shape, "uniform", (0.0, 1.0)),
        )
        return {"generate": GraphSpec("generate", Generate(self), Generate(self), inputs, (image,))}

    def folded(self) -> "ToyGenerator":
        return self


class ToyPlan(TrainingPlan):
    """Every z to every image, which ends at the mean image."""

    model: ToyGenerator

    def __init__(self, model: ToyGenerator) -> None:
        super().__init__()
        self.model = model

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("generator", "generator"),)

    def groups(self) -> dict[str, dict[str, list[nn.Parameter]]]:
        return {"generator": {"plane": list(self.model.parameters())}}

    def draws(self, phase: str) -> tuple[TensorSpec, ...]:
        return (TensorSpec("z", (6,), "noise"),)

    def loss(self, phase: str, batch: Batch, place: Place) -> LossTerms:
        error = (self.model.decode(batch.draws) - batch.pixels / 255).square().mean()
        return LossTerms(error, None, {"error": error.detach()})


class Generate(nn.Module):
    def __init__(self, model: ToyGenerator) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, contrast: Tensor, dither: Tensor) -> tuple[Tensor]:
        return (self.model.decode({"z": z, "contrast": contrast, "dither": dither}),)


TINY: dict[str, Any] = {
    "model": {},
    "training": {"batch_size": 4, "accumulate": 1, "learning_rates": {"plane": 1e-2}, "init_images": 4},
}

FAMILY = Family("toy-generator", "a toy without inverse", ToyConfig, {"toy-generator": TINY}, TINY, ToyGenerator)
