"""The Glow model (spec section 3): squeeze, flow steps, split, level by level; exact in both directions.

The paper calls image to latents "forward"; here that is `inverse`, as for every family.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.conditions import Options
from hflow_rt.errors import DataError
from hflow_rt.layers.actnorm import data_init
from hflow_rt.layers.fold import folded_copy
from hflow_rt.models.bins import public_levels, to_model, to_public
from hflow_rt.models.family import Bound, Conditions, GraphSpec, LossTerms
from hflow_rt.models.flow import FlowModel, InversePass
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.flow import ChainResult, FlowChain
from hflow_rt.models.glow.folded import FOLDS
from hflow_rt.models.glow.graphs import graphs
from hflow_rt.models.glow.prior import Gaussian, SplitPrior, TopPrior, ZeroLinear, standard_log_prob

__all__ = ["LABELS", "Encoded", "Glow", "Level"]

LABELS = "labels"  # what the one-hot classes `[B, classes]` are called among latents and graph inputs


@dataclass(frozen=True)
class Encoded:
    """One pass image to latents, each list by level, finest first.

    chains: what the flow steps yield; raw: the latents before they are measured in prior stds, latents: after;
    log_prior `[B]` in nats, of the raw latents; logits `[B, classes]` of the classifier, if there is one.
    """

    chains: list[ChainResult]
    raw: list[Tensor]
    latents: list[Tensor]
    log_prior: list[Tensor]
    logits: Tensor | None

    @property
    def log_prob(self) -> Tensor:
        """Log-density `[B]` of the image in model range, nats."""
        return torch.stack([*self.log_prior, *(chain.log_det for chain in self.chains)]).sum(0)


@dataclass(frozen=True)
class Decoded:
    """One pass latents to image: the image in model range, and each level's raw latent, finest first."""

    image: Tensor
    raw: list[Tensor]


class Level(nn.Module):
    """The flow steps between one squeeze and the next split, and the prior of what is split off."""

    def __init__(self, config: GlowConfig, index: int) -> None:
        super().__init__()
        self.chain = FlowChain(config, index)
        learned = config.split_prior and index < config.levels - 1
        self.prior = SplitPrior(config, index) if learned else None


class Glow(FlowModel):
    """Invertible multi-scale image model; `latents -> image -> latents` and back are both the identity.

    Latents coarse to fine: `z{L-1}` `[B, 12 2^(L-1), R/2^L, R/2^L]`, then `z{L-2}` ... `z0`. With learned priors they
    are deviations in prior stds, so that all are standard normal. A model of classes takes `labels` beside them.
    """

    config: GlowConfig
    initialized: Tensor

    def __init__(self, config: GlowConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList(Level(config, index) for index in range(config.levels))
        self.top = TopPrior(config)
        top_channels = config.width(config.levels - 1)
        self.classifier = ZeroLinear(top_channels, len(config.classes)) if config.classifier else None
        self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))

    # -- names and shapes

    @property
    def resolution(self) -> int:
        return self.config.resolution

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for index in reversed(range(self.config.levels)):
            split = index < self.config.levels - 1
            side = self.config.side(index)
            shapes[f"z{index}"] = (self.config.width(index) // (2 if split else 1), side, side)
        return shapes

    def prior_std(self) -> dict[str, float]:
        return dict.fromkeys(self.latent_shapes(), 1.0)

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def _levels(self) -> list[Level]:
        return cast("list[Level]", list(self.levels))

    # -- the two directions, in model range

    def encode_model(self, x: Tensor, labels: Tensor | None = None) -> Encoded:
        """Images in [-0.5, 0.5) `[B, 3, R, R]` to latents; labels: one-hot, of a model of classes."""
        chains: list[ChainResult] = []
        raw: list[Tensor] = []
        latents: list[Tensor] = []
        log_prior: list[Tensor] = []
        for level in self._levels():
            chain = level.chain.inverse(F.pixel_unshuffle(x, 2))
            chains.append(chain)
            if len(chains) < len(self.levels):
                x, z = chain.value.chunk(2, 1)
                prior = None if level.prior is None else level.prior(x)
            else:
                z = chain.value
                prior = self.top(z, labels)
            deviation = z if prior is None else prior.deviation(z)
            log_prior.append(standard_log_prob(deviation) if prior is None else prior.log_prob(deviation))
            raw.append(z)
            latents.append(deviation)
        logits = None if self.classifier is None else self.classifier(raw[-1].mean((2, 3))).to(x.dtype)
        return Encoded(chains, raw, latents, log_prior, logits)

    def decode_model(self, latents: Mapping[str, Tensor]) -> Decoded:
        """Latents, and labels where the model has classes, to images in model range."""
        raw: list[Tensor] = []
        x: Tensor | None = None
        levels = self._levels()
        for index in reversed(range(self.config.levels)):
            level, z = levels[index], latents[f"z{index}"]
            prior: Gaussian | None
            if x is None:
                prior = self.top(z, latents.get(LABELS))
            elif level.prior is not None:
                prior = level.prior(x)
            else:
                prior = None
            z = z if prior is None else prior.value(z)
            raw.insert(0, z)
            chain: ChainResult = level.chain(z if x is None else torch.cat([x, z], 1))
            x = F.pixel_shuffle(chain.value, 2)
        assert x is not None
        return Decoded(x, raw)

    def named_latents(self, encoded: Encoded) -> dict[str, Tensor]:
        """The latents of a pass by name, coarse to fine."""
        return {f"z{index}": encoded.latents[index] for index in reversed(range(self.config.levels))}

    # -- the family contract

    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        for name, shape in self.latent_shapes().items():
            if name not in latents or tuple(latents[name].shape[1:]) != shape:
                found = list(latents[name].shape) if name in latents else "nothing"
                raise DataError(f"latent {name} must be [B, {', '.join(map(str, shape))}], not {found}")
        self._labels(latents)
        return to_public(self.decode_model(latents).image, self.config.bits)

    def encode(self, images: Tensor, conditions: Conditions | None = None) -> InversePass:
        side = self.resolution
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise DataError(f"images must be [B, 3, {side}, {side}], not {list(images.shape)}")
        encoded = self.encode_model(to_model(images, self.config.bits), self._labels(conditions))
        return InversePass(self.named_latents(encoded), encoded.log_prob)

    def loss(
        self, images: Tensor, noise: Mapping[str, Tensor] | None = None, conditions: Conditions | None = None
    ) -> LossTerms:
        """Mean bits per dimension, plus the weighted cross-entropy of the classifier in bits (spec 3.1 and 3.2)."""
        labels = self._labels(conditions)
        encoded = self.encode_model(images, labels)
        parts = self._parts(encoded)
        loss = bits = torch.stack(list(parts.values())).sum(0).mean()
        terms = {name: (parts[f"{name}.prior"] + parts[f"{name}.log_det"]).mean() for name in self.latent_shapes()}
        if encoded.logits is not None:
            assert labels is not None
            terms["class"] = F.cross_entropy(encoded.logits, labels.to(encoded.logits.dtype)) / math.log(2)
            loss = bits + self.config.class_weight * terms["class"]
        return LossTerms(loss, bits.detach(), {name: value.detach() for name, value in terms.items()})

    def bounds(self) -> dict[str, Bound]:
        return {"strict": Bound("strict bound", "upper"), "paper": Bound("paper's bound", "published")}

    def bound_inputs(
        self, bound: str, pixels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> dict[str, Tensor]:
        """The published bound is the strict one: uniform dequantisation is all that is random."""
        uniform = torch.rand(pixels.shape, generator=generator).to(pixels.device)
        inputs = {"image": public_levels(pixels, self.config.bits), "uniform": uniform}
        labels = self._labels(conditions)
        return inputs if labels is None else inputs | {LABELS: labels}

    def bound_terms(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = next(self.parameters())
        image, uniform = inputs["image"].to(like), inputs["uniform"].to(like)
        x = to_model(image, self.config.bits) + (uniform - 0.5) / (1 << self.config.bits)
        return self._parts(self.encode_model(x, self._labels(inputs)))

    def conditions(self) -> Options:
        return {LABELS: self.config.classes} if self.config.classes else {}

    def _labels(self, given: Conditions | None) -> Tensor | None:
        """The labels among `given`; None for a model without classes. Raises `DataError`."""
        if not self.config.classes:
            return None
        labels = None if given is None else given.get(LABELS)
        if labels is None or labels.dim() != 2 or labels.shape[1] != len(self.config.classes):
            found = "nothing" if labels is None else list(labels.shape)
            raise DataError(f"{LABELS} must be one-hot [B, {len(self.config.classes)}], not {found}")
        return labels

    def _parts(self, encoded: Encoded) -> dict[str, Tensor]:
        """`NAME.prior` and `.log_det` of every latent, and `z0.bins`, `[B]` in bits per dimension of the image.

        `bins` turns the density on a range of length 1 into the probability of one of 2^bits bins.
        """
        unit = -1 / (3 * self.resolution**2 * math.log(2))
        parts: dict[str, Tensor] = {}
        for index in reversed(range(self.config.levels)):
            parts[f"z{index}.prior"] = encoded.log_prior[index] * unit
            parts[f"z{index}.log_det"] = encoded.chains[index].log_det * unit
        parts["z0.bins"] = torch.full_like(encoded.log_prior[0], float(self.config.bits))
        return parts

    def initialize(self, pixels: Tensor, generator: torch.Generator) -> None:
        self.init_from_batch(self.dequantize(pixels, generator))

    def init_from_batch(self, x: Tensor) -> None:
        """Fit every actnorm to images in model range, each to what those before it make of them (spec 2.2 and 4)."""
        with data_init(self):
            for level in self._levels():
                x = level.chain.inverse(F.pixel_unshuffle(x, 2)).value.chunk(2, 1)[0]
            self.initialized.fill_(1)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"flow": list(self.parameters())}

    def graphs(self) -> dict[str, GraphSpec]:
        return graphs(self)

    def folded(self) -> "Glow":
        return folded_copy(self, FOLDS)
