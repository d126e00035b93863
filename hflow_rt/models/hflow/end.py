"""The end block: the coarsest vector, its encoder, its flow, and what it feeds (spec 2.8-2.10)."""

import copy
import itertools

import torch
from torch import Tensor, nn

from hflow_rt.layers.equalized import EqualizedConv2d, EqualizedLinear
from hflow_rt.layers.fold import fold_children
from hflow_rt.models.hflow.autoencoder import EncoderBlock
from hflow_rt.models.hflow.config import HFlowConfig
from hflow_rt.models.hflow.flow import FlowResult, end_chain

__all__ = ["EndEncoder", "EndFlow", "EndOutput"]


class EndEncoder(nn.Module):
    """Trunk features `[B, E, 4, 4]` to the end vector `[B, D]`; no blur, no norm at 1x1."""

    def __init__(self, config: HFlowConfig) -> None:
        super().__init__()
        last, width, lr = config.levels[-1], config.end.width, config.encoder_lr_scale
        kernel = last.encoder_kernel
        self.block1 = EncoderBlock(4, last.encoder_channels, width, kernel, lr, target=width, trunk=False, blur=False)
        self.block2 = EncoderBlock(2, width, width, kernel, lr, target=0, trunk=True, blur=False)

    def forward(self, h: Tensor) -> Tensor:
        """`[B, E, 4, 4]` to `[B, D]`."""
        end: Tensor = self.block2(self.block1(h)[1])[1]
        return end.flatten(1)


class EndFlow(nn.Module):
    """Part 0 unconditional, each later part conditioned on a linear map of all parts before it."""

    def __init__(self, config: HFlowConfig) -> None:
        super().__init__()
        end = config.end
        conditions = (None, *end.condition_channels)
        self.parts = nn.ModuleList(
            end_chain(channels, width, condition, steps, end.mixing_scale, end.unitary)
            for channels, width, condition, steps in zip(
                end.channels, end.coupling_channels, conditions, end.steps, strict=True
            )
        )
        before = [sum(end.channels[: i + 1]) for i in range(len(end.channels) - 1)]
        self.conditions = nn.ModuleList(
            EqualizedLinear(c_in, c_out) for c_in, c_out in zip(before, end.condition_channels, strict=True)
        )

    def condition(self, part: int, known: list[Tensor]) -> Tensor | None:
        """What part `part` is conditioned on, from the parts before it."""
        if part == 0:
            return None
        result: Tensor = self.conditions[part - 1](torch.cat(known[:part], 1))
        return result

    def decode(self, z: list[Tensor]) -> list[FlowResult]:
        """Latent parts `[B, d_i]` to parts of the end vector, in sequence."""
        results: list[FlowResult] = []
        known: list[Tensor] = []
        for part, chain in enumerate(self.parts):
            results.append(chain(z[part], self.condition(part, known)))
            known.append(results[-1].value)
        return results

    def encode(self, u: list[Tensor], known: list[Tensor] | None = None) -> list[FlowResult]:
        """Parts of the end vector to latents; conditions come from `known` where it differs from `u`."""
        known = u if known is None else known
        return [
            chain.inverse(u[part], self.condition(part, known))  # type: ignore[operator]
            for part, chain in enumerate(self.parts)
        ]


class EndOutput(nn.Module):
    """The end vector as the decoders see it: style vector g and the 4x4 start tensor."""

    visible_to_style: Tensor
    visible_to_base: Tensor

    def __init__(self, config: HFlowConfig) -> None:
        super().__init__()
        end = config.end
        width = end.width
        for name, (start, stop) in (("style", end.hidden_from_style), ("base", end.hidden_from_base)):
            visible = torch.ones(1, width)
            visible[:, start:stop] = 0
            self.register_buffer(f"visible_to_{name}", visible, persistent=False)
        sizes = [width, *([config.style_channels] * 6)]
        self.mapping: nn.Module = nn.Identity()
        if config.maps_style:
            self.mapping = nn.Sequential(
                *(
                    EqualizedLinear(a, b, activation="leaky", lr_scale=end.mapping_lr_scale)
                    for a, b in itertools.pairwise(sizes)
                )
            )
        self.base = EqualizedConv2d(width, width)
        self.constant = nn.Parameter(torch.randn(1, width, 4, 4))
        self.constant_start = end.constant_start

    def forward(self, end: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, D]` to g `[B, S]` and the start `[B, D, 4, 4]`."""
        style = self.mapping(end * self.visible_to_style)
        if self.constant_start:
            return style, self.constant.expand(end.shape[0], -1, -1, -1)
        base = self.base((end * self.visible_to_base)[:, :, None, None])
        return style, base + self.constant

    def fold(self) -> nn.Module:
        """The same with the visibility masks folded into weights; a start that sees nothing becomes a constant."""
        folded = copy.deepcopy(self)
        if self.constant_start or not bool(self.visible_to_base.any()):
            if not self.constant_start:
                folded.constant = nn.Parameter(self.constant + self.base.effective()[1].view(1, -1, 1, 1))
            folded.constant_start = True
            folded.base = nn.Identity()  # type: ignore[assignment]
        fold_children(folded)
        return folded
