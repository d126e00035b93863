"""Flow steps and the chain of a level (spec 2.7): `forward` is latent to data, `inverse` data to latent."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hflow_rt.layers.lu import LUMixing
from hflow_rt.layers.mixing import FreeMixing
from hflow_rt.layers.permutation import ChannelPermutation
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.coupling import BatchNormalizer, Coupling

__all__ = ["ChainResult", "FlowChain", "FlowStep"]


@dataclass(frozen=True)
class ChainResult:
    """`value` and the log-determinant in nats, in the direction that was run.

    coupling `[steps, B]` in the order of the steps; constant: a scalar, of all that does not depend on the input.
    """

    value: Tensor
    coupling: Tensor
    constant: Tensor

    @property
    def log_det(self) -> Tensor:
        """The whole log-determinant `[B]`."""
        return self.coupling.sum(0) + self.constant


class FlowStep(nn.Module):
    """Image to latents: actnorm, channel mixing, coupling."""

    def __init__(self, channels: int, config: GlowConfig) -> None:
        super().__init__()
        self.actnorm = BatchNormalizer(channels)
        self.mixing = _mixing(channels, config)
        self.coupling = Coupling(channels, config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latent to data, with the coupling's log-determinant `[B]`."""
        x, log_det = self.coupling(x)
        return self.actnorm(self.mixing(x)), log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to latent, with the coupling's log-determinant `[B]`."""
        return self.coupling.inverse(self.mixing.inverse(self.actnorm.inverse(x)))

    def constant(self, x: Tensor) -> Tensor:
        """Log-determinant of actnorm and mixing in `inverse` at the size of `x`: a scalar."""
        return self.actnorm.log_det(x) + self.mixing.log_det(x)


class FlowChain(nn.Module):
    """The steps of a level, in the order from image to latents."""

    def __init__(self, config: GlowConfig, level: int) -> None:
        super().__init__()
        channels = config.width(level)
        self.side = config.side(level)
        self.steps = nn.ModuleList(FlowStep(channels, config) for _ in range(config.steps))
        self.invertible_backward = config.invertible_backward

    def forward(self, x: Tensor) -> ChainResult:
        """Latent to data, `[B, C, H, W]`."""
        log_dets: list[Tensor] = []
        for step in reversed(list(self.steps)):
            x, log_det = step(x)
            log_dets.insert(0, log_det)
        return ChainResult(x, torch.stack(log_dets), -self._constant(x))

    def inverse(self, x: Tensor) -> ChainResult:
        """Data to latent."""
        if self.invertible_backward and torch.is_grad_enabled():
            from hflow_rt.models.glow.invertible import run_recomputed

            y, log_dets = run_recomputed(self, x)
        else:
            y, log_dets = self.run(x)
        return ChainResult(y, log_dets, self._constant(y))

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Every step from data to latent, with the log-determinants of the couplings `[steps, B]`."""
        log_dets: list[Tensor] = []
        for step in self.steps:
            x, log_det = step.inverse(x)  # type: ignore[operator]
            log_dets.append(log_det)
        return x, torch.stack(log_dets)

    def _constant(self, x: Tensor) -> Tensor:
        return torch.stack([step.constant(x) for step in self.steps]).sum()  # type: ignore[operator]


def _mixing(channels: int, config: GlowConfig) -> FreeMixing | LUMixing | ChannelPermutation:
    if config.permutation == "reverse":
        return ChannelPermutation(torch.arange(channels - 1, -1, -1))
    if config.permutation == "shuffle":
        return ChannelPermutation(torch.randperm(channels))
    return LUMixing(channels) if config.lu else FreeMixing(channels, 1.0)
