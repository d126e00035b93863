"""A family without what flows take for granted: no inverse, no likelihood, noise and a control beside the latent."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hflow_rt.models.family import GraphSpec, LatentModel, LossTerms, Space, TensorSpec
from hflow_rt.models.plan import Batch, Phase, Place, TrainingPlan
from hflow_rt.models.registry import Family, ModelConfig

NO_INVERSE = "a toy generator maps latents to images only"


class ToyConfig(ModelConfig):
    resolution: int = 8


class ToyGenerator(LatentModel):
    """z to an image: a plane of colours, `contrast` around grey, with `dither` of a twentieth."""

    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping = nn.Linear(6, 5)
        self.plane = nn.Linear(5, 3 * config.resolution**2)

    @property
    def resolution(self) -> int:
        return self.config.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"z": (6,)}

    def prior_std(self) -> dict[str, float]:
        return {"z": 1.0}

    def prior(self) -> dict[str, Any]:
        return {"z": "unscaled"}

    def spaces(self) -> dict[str, Space]:
        return {"w": Space(into="map", decode="paint")}

    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        w = latents["w"] if "w" in latents else self.mapping(latents["z"]).tanh()
        image = self.plane(w).tanh().unflatten(1, (3, self.resolution, self.resolution))
        if "contrast" in latents:
            image = image * latents["contrast"][:, None, None, None]
        if "dither" in latents:
            image = image + 0.1 * (latents["dither"] - 0.5)
        return (0.5 + 0.5 * image).clamp(0, 1)

    def plan(self, settings: Any) -> TrainingPlan:
        return ToyPlan(self)

    def routes(self) -> dict[str, str]:
        return {"forward": "generate"}

    def absent(self) -> dict[str, str]:
        return {"inverse": NO_INVERSE}

    def graphs(self) -> dict[str, GraphSpec]:
        image = TensorSpec("image", (3, self.resolution, self.resolution), "image", (0.0, 1.0))
        z, w = TensorSpec("z", (6,), "latent"), TensorSpec("w", (5,), "value")
        beside = (
            TensorSpec("contrast", (), "control", (0.0, 1.0), default=0.8),
            TensorSpec("dither", image.shape, "uniform", (0.0, 1.0)),
        )
        made = {"generate": ((z, *beside), image), "map": ((z,), w), "paint": ((w, *beside), image)}
        return {
            name: GraphSpec(name, Part(self, inputs, output), Part(self, inputs, output), inputs, (output,))
            for name, (inputs, output) in made.items()
        }


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


class Part(nn.Module):
    def __init__(self, model: ToyGenerator, inputs: tuple[TensorSpec, ...], output: TensorSpec) -> None:
        super().__init__()
        self.model, self.names, self.maps = model, [spec.name for spec in inputs], output.name == "w"

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        given = dict(zip(self.names, inputs, strict=True))
        return (self.model.mapping(given["z"]).tanh() if self.maps else self.model.decode(given),)


TINY: dict[str, Any] = {
    "model": {},
    "training": {"batch_size": 4, "accumulate": 1, "learning_rates": {"plane": 1e-2}, "init_images": 4},
}

FAMILY = Family("toy-generator", "a toy without inverse", ToyConfig, {"toy-generator": TINY}, TINY, ToyGenerator)
