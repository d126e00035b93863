"""INR-GAN: images as networks from coordinates to colours (Skorokhodov, Ignatyev & Elhoseiny, CVPR 2021)."""

from __future__ import annotations

from collections.abc import Mapping as Named
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hflow_rt.errors import ConfigError
from hflow_rt.models.family import GraphSpec, LatentModel, Prior, Route, Space
from hflow_rt.models.inrgan.config import INRGANConfig
from hflow_rt.models.inrgan.discriminator import check_groups
from hflow_rt.models.inrgan.folded import FoldedForward, FoldedSynthesis
from hflow_rt.models.inrgan.graphs import graphs
from hflow_rt.models.inrgan.network import Mapping, Synthesis, shortening
from hflow_rt.models.inrgan.plan import INRGANPlan
from hflow_rt.models.inrgan.view import seen

if TYPE_CHECKING:
    from hflow_rt.conditions import Options
    from hflow_rt.models.plan import TrainingPlan
    from hflow_rt.training.config import TrainingConfig

__all__ = ["INRGAN", "LABELS", "NO_INVERSE"]

LABELS = "labels"
NO_INVERSE = "an INR-GAN maps latents to images only; 'hflow-rt project IMAGE' searches for those of an image"


class INRGAN(LatentModel):
    """The generator. `w_avg` `[W]` is the running mean of w, towards which truncation goes."""

    config: INRGANConfig
    w_avg: Tensor

    def __init__(self, config: INRGANConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping = Mapping(config.z_dim, config.w_dim, len(config.classes), config.mapping_layers)
        self.synthesis = Synthesis(config)
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def slots(self, w: Tensor) -> Tensor:
        """The same w `[B, W]` in every slot, `[B, S, W]`."""
        return w[:, None].expand(-1, self.config.slots, -1)

    @torch.no_grad()
    def follow(self, w: Tensor) -> None:
        """Move `w_avg` towards the mean of w `[B, W]`."""
        self.w_avg.lerp_(w.mean(0), 1 - self.config.w_avg_decay)

    def truncated(self, w: Tensor, psi: Tensor, cutoff: Tensor) -> Tensor:
        """w `[B, S, W]` nearer to `w_avg`, see `shortening`; itself to the bit where psi is 1."""
        slots = torch.arange(self.config.slots, device=w.device, dtype=w.dtype)
        return w + shortening(slots, psi, cutoff)[:, :, None] * (self.w_avg - w)

    def public(self, w: Tensor, psi: Tensor, cutoff: Tensor) -> Tensor:
        """w `[B, S, W]`, truncated, to an image in [0, 1]."""
        w = self.truncated(w, psi, cutoff)
        image = self.synthesis.forward(w) if self.config.view is None else seen(self.synthesis, self.config, w)
        return (image * 0.5 + 0.5).clamp(0, 1)

    def labels(self, conditions: Named[str, Tensor]) -> Tensor | None:
        """Those that the network takes, `[B, options]`; None of an unconditional one."""
        return conditions[LABELS] if self.config.classes else None

    # -- the family contract

    @property
    def resolution(self) -> int:
        return self.config.resolution if self.config.view is None else self.config.view.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"z": (self.config.z_dim,)}

    def prior_std(self) -> dict[str, float]:
        return {"z": 1.0}

    def conditions(self) -> Options:
        return {LABELS: self.config.classes} if self.config.classes else {}

    def prior(self) -> dict[str, Prior]:
        return {"z": "unscaled"}

    def plan(self, settings: TrainingConfig) -> TrainingPlan:
        if self.config.view is not None:
            raise ConfigError("a view is for drawing; train without model.view")
        check_groups(self.config.discriminator.group, settings.batch_size)
        return INRGANPlan(self)

    def routes(self) -> dict[Route, str]:
        return {"forward": "forward"}

    def absent(self) -> dict[Route, str]:
        return {"inverse": NO_INVERSE}

    def graphs(self) -> dict[str, GraphSpec]:
        return graphs(self)

    def spaces(self) -> dict[str, Space]:
        """`w`, one a slot, before truncation."""
        return {"w": Space(into="mapping", decode="synthesis", slots=True)}

    def unclamped(self, graph: str) -> nn.Module:
        module = super().unclamped(graph)
        assert isinstance(module, FoldedForward | FoldedSynthesis)
        module.painter.clamps = False
        return module
