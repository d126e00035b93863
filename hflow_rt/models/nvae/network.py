"""The two towers (spec 3): features go bottom-up, latents and the image come top-down, group by group."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hflow_rt.kernels.residual_normal import normal_divergence, residual_normal
from hflow_rt.models.nvae.batch_norm import standing_still
from hflow_rt.models.nvae.cells import (
    DecoderCombiner,
    EncoderCombiner,
    decoder_cell,
    down_cell,
    encoder_cell,
    up_cell,
)
from hflow_rt.models.nvae.config import EXPANSION_AFTER, EXPANSION_TOWER, NVAEConfig
from hflow_rt.models.nvae.convolution import NormedConv2d
from hflow_rt.models.nvae.normal import Normal
from hflow_rt.models.nvae.posterior_flow import PosteriorFlow

__all__ = ["Generated", "Group", "Inferred", "Network", "packed", "unpacked"]

# group, the decoder's state and the prior's raw parameters to the group's latents
Choose = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """What inference knows of a group, `[B, n, side, side]` each.

    raw: the posterior's parameters as the sampler yields them, which are `relative` to the prior's or not; raw_prior:
    the prior's, `[1, 2 n, 1, 1]` zeros at the top. noise: standard normal. path: what the posterior makes of it, then
    what every flow makes of that; the last is z. kl: of posterior and prior before flows, `[B, n]`.
    """

    raw: Tensor
    raw_prior: Tensor
    relative: bool
    noise: Tensor
    path: tuple[Tensor, ...]
    kl: Tensor

    @property
    def z(self) -> Tensor:
        """The latents."""
        return self.path[-1]

    @cached_property
    def posterior(self) -> Normal:
        """That of the first of the path."""
        return Normal.of_raw(self.raw + self.raw_prior if self.relative else self.raw)

    @cached_property
    def prior(self) -> Normal:
        """That of the latents."""
        return Normal.of_raw(self.raw_prior)

    def log_q(self) -> Tensor:
        """Log density of z under the posterior, by element: flows keep volume."""
        return self.posterior.log_prob(self.path[0])

    def log_p(self) -> Tensor:
        """Log density of z under the prior, by element."""
        return self.prior.log_prob(self.z)

    def log_ratio(self) -> Tensor:
        """`log q - log p` of this z by channel, `[B, n]`."""
        return normal_divergence(self.raw, self.raw_prior, self.noise, self.z, self.relative)

    def divergence(self) -> Tensor:
        """KL by channel, `[B, n]`: of the two distributions, and with flows of this one sample."""
        return self.kl if len(self.path) == 1 else self.log_ratio()


@dataclass(frozen=True)
class Inferred:
    """Groups, top first, and parameters of the distribution of pixels, `[B, head_channels, canvas, canvas]`."""

    groups: tuple[Group, ...]
    logits: Tensor

    def by_group(self, quantity: Callable[[Group], Tensor]) -> Tensor:
        """A quantity by element or channel, summed over every group, `[B, groups]`."""
        return torch.stack([quantity(group).flatten(1).sum(1) for group in self.groups], 1)


@dataclass(frozen=True)
class Generated:
    """Latents of every group, top first, and parameters of the distribution of pixels."""

    latents: tuple[Tensor, ...]
    logits: Tensor


class Network(nn.Module):
    """Encoder, decoder, and what infers and generates latents between them. Images are on the canvas, in [0, 1]."""

    config: NVAEConfig
    top_prior: Tensor

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        self.config = config
        depth, latents = len(config.groups) - 1, config.latent_channels
        scales = config.group_scales
        # modules are made in the published order, which optimizer states keep
        self.top = nn.Parameter(torch.rand(config.decoder_channels(depth), config.side(depth), config.side(depth)))
        self.register_buffer("top_prior", torch.zeros(1, 2 * latents, 1, 1), persistent=False)
        self.stem = NormedConv2d(config.channels, config.encoder_width, 3)
        self.before = _before(config)
        self.encoder = _encoder(config)
        deepest = config.encoder_channels(depth)
        self.encoder_end = nn.Sequential(nn.ELU(), NormedConv2d(deepest, deepest, 1), nn.ELU())
        self.posteriors = nn.ModuleList(NormedConv2d(config.encoder_channels(s), 2 * latents, 3) for s in scales)
        self.priors = nn.ModuleList(
            nn.Sequential(nn.ELU(), NormedConv2d(config.decoder_channels(s), 2 * latents, 1)) for s in scales[1:]
        )
        self.flows = nn.ModuleList(PosteriorFlow(latents) for _ in range(len(scales) * config.flows))
        self.decoder = _decoder(config)
        self.after = _after(config)
        self.head = nn.Sequential(nn.ELU(), NormedConv2d(config.decoder_width, config.head_channels, 3))

    def bottom_up(self, image: Tensor) -> list[Tensor]:
        """What inference needs of an image `[B, C, canvas, canvas]`, a feature map for each group, top first."""
        x = self.stem(2 * image - 1)
        for cell in self.before:
            x = self._run(cell, x)
        stored: list[Tensor] = []
        for element in self.encoder:
            if isinstance(element, EncoderCombiner):
                stored.append(x)
            else:
                x = self._run(element, x)
        return [self.encoder_end(x), *reversed(stored)]

    def top_down(self, choose: Choose, batch: int) -> Tensor:
        """Parameters of the distribution of pixels, for latents that `choose` tells group by group, top first."""
        group, state = 0, self.top.expand(batch, *self.top.shape)
        for element in self.decoder:
            if isinstance(element, DecoderCombiner):
                prior = self.priors[group - 1](state) if group else self.top_prior
                state = element(state, choose(group, state, prior))
                group += 1
            else:
                state = self._run(element, state)
        for cell in self.after:
            state = self._run(cell, state)
        logits: Tensor = self.head(state)
        return logits

    def _run(self, cell: nn.Module, x: Tensor) -> Tensor:
        """What a cell makes of x, in training by the way that the settings say."""
        if not (self.config.recompute and self.training and torch.is_grad_enabled()):
            out: Tensor = cell(x)
            return out
        contexts = partial(_contexts, cell)
        again: Tensor = checkpoint(cell, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return again

    def infer(self, features: Sequence[Tensor], noise: Sequence[Tensor]) -> Inferred:
        """Latents of an image by its features, drawn by standard normal noise for each group, top first."""
        config, groups = self.config, list[Group]()
        combiners = [element for element in self.encoder if isinstance(element, EncoderCombiner)][::-1]

        def choose(group: int, state: Tensor, prior: Tensor) -> Tensor:
            feature = combiners[group - 1](features[group], state) if group else features[group]
            raw = self.posteriors[group](feature)
            value, kl = residual_normal(raw, prior, noise[group], config.residual_posterior)
            path = [value]
            for flow in self.flows[group * config.flows : (group + 1) * config.flows]:
                path.append(flow(path[-1]))
            groups.append(Group(raw, prior, config.residual_posterior, noise[group], tuple(path), kl))
            return path[-1]

        logits = self.top_down(choose, features[0].shape[0])
        return Inferred(tuple(groups), logits)

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Parameters of the distribution of pixels for latents of each group, top first. No prior is asked."""
        return self.top_down(lambda group, state, prior: latents[group], latents[0].shape[0])

    def generate(self, noise: Sequence[Tensor]) -> Generated:
        """Latents that noise for each group, top first, stands for under the prior. A temperature scales the noise."""
        latents: list[Tensor] = []

        def choose(group: int, state: Tensor, prior: Tensor) -> Tensor:
            latents.append(Normal.of_raw(prior).at(noise[group]))
            return latents[-1]

        logits = self.top_down(choose, noise[0].shape[0])
        return Generated(tuple(latents), logits)

    def pad(self, image: Tensor) -> Tensor:
        """An image `[B, C, R, R]` on the canvas."""
        return F.pad(image, (self.config.padding,) * 4)

    def crop(self, canvas: Tensor) -> Tensor:
        """The inverse of `pad`; the last two axes are those of pixels."""
        padding = self.config.padding
        return canvas[..., padding : padding + self.config.resolution, padding : padding + self.config.resolution]


def _contexts(cell: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the first pass through a cell and of the second, whose batch is counted already."""
    return nullcontext(), standing_still(cell)


def packed(config: NVAEConfig, name: str, groups: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors for each group, top first, as one for each scale; see `NVAEConfig.packed_shapes`."""
    found: dict[int, list[Tensor]] = {}
    for scale, tensor in zip(config.group_scales, groups, strict=True):
        found.setdefault(scale, []).append(tensor)
    return {f"{name}{scale}": torch.cat(tensors, 1) for scale, tensors in found.items()}


def unpacked(config: NVAEConfig, name: str, scales: Mapping[str, Tensor]) -> list[Tensor]:
    """The inverse of `packed`."""
    tensors = (scales[key] for key in config.packed_shapes(name))
    return [group for tensor in tensors for group in torch.split(tensor, config.latent_channels, 1)]


def _before(config: NVAEConfig) -> nn.ModuleList:
    cells = nn.ModuleList()
    for block in range(config.blocks):
        channels = config.encoder_width << block
        cells.extend(encoder_cell(channels, config.squeeze_excite) for _ in range(config.block_cells - 1))
        cells.append(down_cell(channels, config.squeeze_excite))
    return cells


def _encoder(config: NVAEConfig) -> nn.ModuleList:
    """Cells of every group, finest first, and behind each group but the last the combiner that will read it."""
    elements, depth = nn.ModuleList(), len(config.groups) - 1
    for scale, groups in enumerate(config.groups):
        channels = config.encoder_channels(scale)
        for group in range(groups):
            elements.extend(encoder_cell(channels, config.squeeze_excite) for _ in range(config.encoder_cells))
            if (scale, group) != (depth, groups - 1):
                elements.append(EncoderCombiner(channels, config.decoder_channels(scale)))
        if scale < depth:
            elements.append(down_cell(channels, config.squeeze_excite))
    return elements


def _decoder(config: NVAEConfig) -> nn.ModuleList:
    """Cells of every group but the top one, coarsest first, and behind them the combiner with its latents."""
    elements = nn.ModuleList()
    for scale in reversed(range(len(config.groups))):
        channels = config.decoder_channels(scale)
        for _ in range(config.groups[scale]):
            if len(elements):
                elements.extend(
                    decoder_cell(channels, EXPANSION_TOWER, config.squeeze_excite) for _ in range(config.decoder_cells)
                )
            elements.append(DecoderCombiner(channels, config.latent_channels))
        if scale:
            elements.append(up_cell(channels, EXPANSION_TOWER, config.squeeze_excite))
    return elements


def _after(config: NVAEConfig) -> nn.ModuleList:
    cells = nn.ModuleList()
    for block in reversed(range(config.blocks)):
        channels = config.decoder_width << block
        cells.append(up_cell(2 * channels, EXPANSION_AFTER, config.squeeze_excite))
        cells.extend(
            decoder_cell(channels, EXPANSION_AFTER, config.squeeze_excite)
            for _ in range(config.decoder_block_cells - 1)
        )
    return cells
