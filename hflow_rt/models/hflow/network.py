"""The hflow model (spec section 1): a pyramid of targets, a conditional flow over each, exact in both directions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hflow_rt.errors import DataError
from hflow_rt.layers.actnorm import data_init
from hflow_rt.layers.equalized import EqualizedConv2d
from hflow_rt.layers.fold import folded_copy
from hflow_rt.models.bins import to_model, to_public
from hflow_rt.models.family import Bound, Conditions, GraphSpec, LossTerms, NoiseScale, Space, Unknown
from hflow_rt.models.flow import FlowModel, InversePass
from hflow_rt.models.hflow import bound as bounding
from hflow_rt.models.hflow.autoencoder import Decoder, Encoder
from hflow_rt.models.hflow.config import HFlowConfig
from hflow_rt.models.hflow.end import EndEncoder, EndFlow, EndOutput
from hflow_rt.models.hflow.flow import FlowResult, LevelFlow, Theta
from hflow_rt.models.hflow.folded import FOLDS
from hflow_rt.models.hflow.graphs import graphs

__all__ = ["IMAGE_SCALE", "Decoded", "Encoded", "HFlow", "Level", "Targets"]

IMAGE_SCALE = 4.0  # y_0 = 4 x brings the variance of the finest target near 1


@dataclass(frozen=True)
class Targets:
    """What the encoder pyramid makes of an image: `levels[l]` `[B, C_l, R_l, R_l]` and the end vector `[B, D]`."""

    levels: list[Tensor]
    end: Tensor


@dataclass(frozen=True)
class Encoded:
    """One pass image to latents: a result per end part and per level, and what conditioned each level."""

    end: list[FlowResult]
    levels: list[FlowResult]
    thetas: list[Theta]
    conditions: list[Tensor]
    skips: list[Tensor | None]


@dataclass(frozen=True)
class Decoded:
    """One pass latents to image; `levels[0].value` is 4 x."""

    end: list[FlowResult]
    levels: list[FlowResult]

    @property
    def image(self) -> Tensor:
        """x `[B, 3, R, R]`, about [-0.5, 0.5]."""
        return self.levels[0].value / IMAGE_SCALE


# a spread is a mean over thousands of elements: a few hundred images pin it to about a percent
_SPREAD_IMAGES = 512


class Level(nn.Module):
    """Everything between one target and the next coarser."""

    def __init__(self, config: HFlowConfig, index: int) -> None:
        super().__init__()
        level = config.levels[index]
        self.encoder = Encoder(config, index)
        self.decoder = Decoder(config, index)
        self.flow = LevelFlow(level)
        self.condition = EqualizedConv2d(level.decoder_channels, level.condition_channels)
        self.skip = (
            EqualizedConv2d(level.decoder_channels, level.skip_channels, lr_scale=config.decoder_lr_scale)
            if index > 0
            else None
        )

    def conditioning(self, coarser: Tensor, style: Tensor, skip: Tensor | None) -> tuple[Theta, Tensor, Tensor | None]:
        """From the next coarser target: the flow's affine maps, its condition, and the skip to the finer decoder."""
        theta, features = self.decoder(coarser, style, skip)
        return theta, self.condition(features), None if self.skip is None else self.skip(features)


class HFlow(FlowModel):
    """Invertible hierarchical image model.

    Latents coarse to fine: `end0`, `end1`, ... `[B, d_i, 1, 1]`, then `z{L-1}` ... `z0` `[B, C_l, R_l, R_l]`.
    image -> latents -> image is exact; latents -> image -> latents is not the identity because the latents hold more
    numbers than the image (spec 3.4).
    """

    config: HFlowConfig

    def __init__(self, config: HFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList(Level(config, index) for index in range(len(config.levels)))
        self.end_encoder = EndEncoder(config)
        self.end_flow = EndFlow(config)
        self.end_output = EndOutput(config)
        # Running mean over batches of each noised target's spread (spec 3.1), so that batch 1 has one too. Only
        # batches of two and more move it.
        for name in self.noised():
            self.register_buffer(f"spread_{name}", torch.ones(()))

    # -- names and shapes

    @property
    def resolution(self) -> int:
        return self.config.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"end{i}": (d, 1, 1) for i, d in enumerate(self.config.end.channels)}
        for index in self.coarse_to_fine():
            level = self.config.levels[index]
            shapes[f"z{index}"] = (level.channels, level.resolution, level.resolution)
        return shapes

    def prior_std(self) -> dict[str, float]:
        stds = {f"end{i}": 1.0 for i in range(len(self.config.end.channels))}
        return stds | {f"z{index}": self.config.levels[index].prior_std for index in self.coarse_to_fine()}

    def coarse_to_fine(self) -> range:
        """Level indices from the 8x8 level to the image."""
        return range(len(self.config.levels) - 1, -1, -1)

    def noised(self) -> dict[str, float]:
        """Targets whose posterior is a Gaussian, with its std relative to the spread of the data."""
        relative = {f"end{i}": value for i, value in enumerate(self.config.end.noise or ())}
        for index in self.coarse_to_fine():
            value = self.config.levels[index].noise
            if value is not None:
                relative[f"z{index}"] = value
        return relative

    # -- the two directions, in model range

    def targets(self, x: Tensor) -> Targets:
        """Image in [-0.5, 0.5] to the targets of every level."""
        h = x * IMAGE_SCALE
        levels = [h]
        for level in self.levels:
            target, h = level.encoder(h)  # type: ignore[operator]
            if target is not None:
                levels.append(target.to(x.dtype))  # flows run in full precision whatever the nets run in
        return Targets(levels, self.end_encoder(h).to(x.dtype))

    def split_end(self, end: Tensor) -> list[Tensor]:
        """The end vector `[B, D]` as its parts."""
        return list(torch.split(end, list(self.config.end.channels), 1))

    def encode_targets(
        self,
        targets: Targets,
        *,
        flow_end: list[Tensor] | None = None,
        flow_levels: Sequence[Tensor] | None = None,
        seen_end: Tensor | None = None,
        seen_levels: Sequence[Tensor] | None = None,
        known_end: list[Tensor] | None = None,
        finest: int = 0,
    ) -> Encoded:
        """Targets to latents. `flow_*` replaces what the flows are evaluated at, `seen_*` what the decoders see,
        `known_end` what conditions the later end parts. Levels finer than `finest` are not run; their results are
        absent."""
        seen_end = targets.end if seen_end is None else seen_end
        seen = list(targets.levels if seen_levels is None else seen_levels)
        modelled = list(targets.levels if flow_levels is None else flow_levels)
        parts = self.split_end(targets.end)
        end = self.end_flow.encode(parts if flow_end is None else flow_end, parts if known_end is None else known_end)
        style, coarser = self.end_output(seen_end)
        skip: Tensor | None = None
        results: list[FlowResult] = []
        thetas: list[Theta] = []
        conditions: list[Tensor] = []
        skips: list[Tensor | None] = []
        for index in range(len(self.levels) - 1, finest - 1, -1):
            level = self.levels[index]
            theta, condition, skip = level.conditioning(coarser, style, skip)  # type: ignore[operator]
            results.insert(0, level.flow.encode(modelled[index], theta, condition))  # type: ignore[operator, union-attr]
            thetas.insert(0, theta)
            conditions.insert(0, condition)
            skips.insert(0, skip)
            coarser = seen[index]
        return Encoded(end, results, thetas, conditions, skips)

    def generate(self, latents: Mapping[str, Tensor]) -> Decoded:
        """Latents to targets and image in model range."""
        end = self.end_flow.decode([latents[f"end{i}"].flatten(1) for i in range(len(self.config.end.channels))])
        style, coarser = self.end_output(torch.cat([part.value for part in end], 1))
        skip: Tensor | None = None
        results: list[FlowResult] = []
        for index in self.coarse_to_fine():
            level = self.levels[index]
            theta, condition, skip = level.conditioning(coarser, style, skip)  # type: ignore[operator]
            results.insert(0, level.flow.decode(latents[f"z{index}"], theta, condition))  # type: ignore[operator, union-attr]
            coarser = results[0].value
        return Decoded(end, results)

    def named_latents(self, encoded: Encoded) -> dict[str, Tensor]:
        """The latents of a pass by name, coarse to fine."""
        values = {f"end{i}": part.value[:, :, None, None] for i, part in enumerate(encoded.end)}
        return values | {f"z{index}": encoded.levels[index].value for index in self.coarse_to_fine()}

    # -- the family contract

    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        for name, shape in self.latent_shapes().items():
            if name not in latents or tuple(latents[name].shape[1:]) != shape:
                found = list(latents[name].shape) if name in latents else "nothing"
                raise DataError(f"latent {name} must be [B, {', '.join(map(str, shape))}], not {found}")
        return to_public(self.generate(latents).image, self.config.bits)

    def encode(self, images: Tensor, conditions: Conditions | None = None) -> InversePass:
        """`log_prob` is the plug-in value of the bound at the noise-free targets, not a strict bound (spec 3.2)."""
        side = self.resolution
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise DataError(f"images must be [B, 3, {side}, {side}], not {list(images.shape)}")
        encoded = self.encode_targets(self.targets(to_model(images, self.config.bits)))
        return InversePass(self.named_latents(encoded), self.log_prob(encoded))

    def log_prob(self, encoded: Encoded) -> Tensor:
        """Sum over parts and levels of log prior, log-determinant and posterior entropy, `[B]` nats."""
        found = bounding.terms(self, encoded, self.running_spreads())
        return torch.stack([term.log_likelihood for term in found.values()]).sum(0)

    def loss(
        self, images: Tensor, noise: Mapping[str, Tensor] | None = None, conditions: Conditions | None = None
    ) -> LossTerms:
        return bounding.training_loss(self, images, noise)

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        return bounding.noise_shapes(self)

    def bounds(self) -> dict[str, Bound]:
        return {"strict": Bound("strict bound", "upper"), "paper": Bound("paper's bound", "published")}

    def bound_inputs(
        self, bound: str, pixels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> dict[str, Tensor]:
        return bounding.bound_inputs(self, bound, pixels, generator)

    def bound_terms(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return bounding.bound_terms(self, inputs)

    def noise_scales(self) -> dict[str, NoiseScale]:
        spreads = self.running_spreads()
        return {name: NoiseScale(std, float(spreads[name])) for name, std in self.noised().items()}

    def initialize(self, pixels: Tensor, generator: torch.Generator) -> None:
        x = self.dequantize(pixels, generator)
        with data_init(self):
            targets = self.targets(x)
            if len(x) > 1:  # one image has no spread; the first real batch will set it
                self.update_spreads(self.batch_spreads(targets), weight=1.0)
            self.encode_targets(targets)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"encoders": [], "decoders": [], "flows": []}
        for name, parameter in self.named_parameters():
            inside = set(name.split("."))
            if inside & {"encoder", "end_encoder"}:
                groups["encoders"].append(parameter)
            elif ("decoder" in inside and not inside & {"style1", "style2"}) or name == "end_output.constant":
                groups["decoders"].append(parameter)
            else:
                groups["flows"].append(parameter)
        return groups

    def graphs(self) -> dict[str, GraphSpec]:
        return graphs(self)

    def folded(self) -> "HFlow":
        return folded_copy(self, FOLDS)

    def spaces(self) -> dict[str, Space]:
        return {"y0": Space(into="end_forward", back="end_inverse")}

    # -- spreads

    def named_targets(self, targets: Targets) -> dict[str, Tensor]:
        """What the flow of each latent models, by the latent's name."""
        parts = {f"end{i}": part for i, part in enumerate(self.split_end(targets.end))}
        return parts | {f"z{index}": target for index, target in enumerate(targets.levels)}

    def running_spreads(self) -> dict[str, Tensor]:
        """Of each noised target, the scalar that training keeps."""
        return {name: getattr(self, f"spread_{name}") for name in self.noised()}

    def batch_spreads(self, targets: Targets) -> dict[str, Tensor]:
        """Of each noised target, the mean over its elements of their std over the batch (spec 3.1)."""
        values = self.named_targets(targets)
        # an element that is the same in the whole batch has no gradient instead of an infinite one
        return {name: values[name].var(0).clamp_min(1e-24).sqrt().mean() for name in self.noised()}

    def unknown(self) -> Unknown | None:
        without = "stay at 1, which makes bits/dim meaningless but changes no image"
        return Unknown("noise scales", _SPREAD_IMAGES, without) if self.noised() else None

    @torch.no_grad()
    def learn(self, batches: Iterable[Tensor]) -> int:
        count, spreads = bounding.dataset_spreads(self, batches)
        self.update_spreads(spreads, weight=1.0)
        return count

    @torch.no_grad()
    def update_spreads(self, spreads: Mapping[str, Tensor], weight: float = 0.01) -> None:
        """Move the running spreads towards those of a batch."""
        for name, value in spreads.items():
            getattr(self, f"spread_{name}").lerp_(value.to(getattr(self, f"spread_{name}").dtype), weight)
