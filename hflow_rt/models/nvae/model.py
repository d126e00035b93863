"""NVAE: a deep hierarchical variational autoencoder (Vahdat & Kautz, NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch

from hflow_rt.evaluation.figures import Estimate, Figure
from hflow_rt.models.bins import public_levels
from hflow_rt.models.family import Bound, Conditions, GraphSpec, LatentModel, Space
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.graphs import SPACES, feature_specs, graphs, noise_specs
from hflow_rt.models.nvae.network import Network, unpacked
from hflow_rt.models.nvae.objective import active_units, bound_parts
from hflow_rt.models.plan import draw

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from hflow_rt.models.plan import TrainingPlan
    from hflow_rt.training.config import TrainingConfig

__all__ = ["NVAE"]


class NVAE(Network, LatentModel):
    """Latents are noise of the priors, packed by scale, so that a std is a temperature."""

    config: NVAEConfig

    @property
    def resolution(self) -> int:
        return self.config.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.config.packed_shapes("z"))

    def prior_std(self) -> dict[str, float]:
        return dict.fromkeys(self.config.packed_shapes("z"), 1.0)

    def round_trip(self) -> Literal["lossy"]:
        return "lossy"

    def plan(self, settings: TrainingConfig) -> TrainingPlan:
        from hflow_rt.models.nvae.plan import NVAEPlan

        return NVAEPlan(self)

    def bounds(self) -> dict[str, Bound]:
        """None of a normal output, which gives densities and no probabilities of levels."""
        if self.config.output == "normal":
            return {}
        if self.config.likelihood == "published":
            return {"published": Bound("published evidence bound", "published")}
        unit: Literal["bits/dim", "nats"] = "nats" if self.config.output == "bernoulli" else "bits/dim"
        return {
            "elbo": Bound("evidence bound", "upper", unit=unit),
            "importance": Bound("importance-weighted bound", "upper", "logmeanexp", unit),
        }

    def bound_inputs(
        self, bound: str, pixels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> dict[str, Tensor]:
        image = public_levels(pixels, self.config.bits)
        return {"image": image, **draw(noise_specs(self.config), len(pixels), generator)}

    def bound_features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.bottom_up(self.pad(inputs["image"].to(self.top)))
        return {spec.name: value for spec, value in zip(feature_specs(self.config), found, strict=True)}

    def bound_terms(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return bound_parts(self, {name: value.to(self.top) for name, value in inputs.items()})

    def bound_figures(self, means: Mapping[str, NDArray[np.float64]]) -> dict[str, Figure]:
        """How many channels of every scale's groups tell of images more than a tenth of a nat."""
        if "channels" not in means:  # of bundles of before
            return {}
        config, found = self.config, dict[str, Figure]()
        active = active_units(torch.from_numpy(means["channels"]).view(-1, config.latent_channels))
        for scale in sorted(set(config.group_scales), reverse=True):
            groups = [int(many) for many, own in zip(active, config.group_scales, strict=True) if own == scale]
            runs = ((many, len(list(run))) for many, run in groupby(groups))
            each = "+".join(f"{length}x{many}" if length > 1 else str(many) for many, length in runs)
            title = f"active channels of z{scale} ({each} of {config.latent_channels} a group, top first)"
            found[f"active{scale}"] = Figure(title, Estimate(sum(groups), math.nan, 1))
        return found

    @torch.no_grad()
    def calibrate(self, latents: Iterable[Mapping[str, Tensor]]) -> None:
        """Statistics of the decoder's batch norms; the encoder keeps those of images."""
        self.train()
        for drawn in latents:
            self.generate([noise.to(self.top) for noise in unpacked(self.config, "z", drawn)])
        self.eval()

    def graphs(self) -> dict[str, GraphSpec]:
        return graphs(self)

    def spaces(self) -> dict[str, Space]:
        return SPACES
