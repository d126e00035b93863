"""Flow steps and the chain of a level (spec 2.11): `forward` is latent to target, `inverse` target to latent."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hflow_rt.kernels.coupling import coupling_forward, coupling_inverse
from hflow_rt.layers.actnorm import ActNorm
from hflow_rt.layers.masks import Split, seen_mask, split_steps
from hflow_rt.layers.mixing import FreeMixing, UnitaryMixing
from hflow_rt.models.hflow.config import LevelConfig
from hflow_rt.models.hflow.coupling import CouplingMLP, coupling_net

__all__ = [
    "SEEN_GAIN",
    "BetweenAffines",
    "FlowChain",
    "FlowResult",
    "FlowStep",
    "LevelFlow",
    "Theta",
    "end_chain",
]

# Restores the variance of a half-masked input. The original keeps it in float32 masks, hence sqrt(2) rounded to
# float32: in float64 the difference shows (4e-6 relative on overdriven samples).
SEEN_GAIN = torch.tensor(math.sqrt(2)).item()


class Theta(NamedTuple):
    """Per-element affine maps at the data side (start) and the latent side (end) of a level, each `[B, C, R, R]`."""

    start_shift: Tensor
    start_log_scale: Tensor
    end_shift: Tensor
    end_log_scale: Tensor

    def to(self, dtype: torch.dtype) -> "Theta":
        """The maps in the precision of the flow's state."""
        return Theta(*(values.to(dtype) for values in self))

    def log_det(self) -> Tensor:
        """Log-determinant `[B]` of both maps from latent to data."""
        return self.start_log_scale.flatten(1).sum(1) + self.end_log_scale.flatten(1).sum(1)


@dataclass(frozen=True)
class FlowResult:
    """`value` and the pieces of its log-determinant in nats, in the direction that was run.

    coupling `[steps, B]` by stored step index; actnorm and mixing are scalars, the same for every sample;
    theta `[B]`, zero where a chain has no such maps.
    """

    value: Tensor
    coupling: Tensor
    actnorm: Tensor
    mixing: Tensor
    theta: Tensor

    @property
    def log_det(self) -> Tensor:
        """The whole log-determinant `[B]`."""
        return self.coupling.sum(0) + self.actnorm + self.mixing + self.theta


class FlowStep(nn.Module):
    """Channel mixing, affine coupling, actnorm, in that order for `forward`."""

    seen: Tensor

    def __init__(
        self,
        net: nn.Module,
        split: Split,
        channels: int,
        resolution: int,
        index: int,
        scale: float,
        unitary: bool,
    ) -> None:
        super().__init__()
        self.mixing = UnitaryMixing(channels, scale) if unitary else FreeMixing(channels, scale)
        self.coupling = net
        self.actnorm = ActNorm(channels)
        self.split = split
        self.register_buffer("seen", seen_mask(split, channels, resolution, index), persistent=False)

    def net(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Raw log-scale and shift from the seen half of `x`, whose variance sqrt(2) restores."""
        seen = x * (self.seen * SEEN_GAIN)
        if self.split in ("vhalfs", "hhalfs"):
            seen = seen.flip(3 if self.split == "vhalfs" else 2)
        log_scale, shift = self.coupling(seen, condition)
        return log_scale.to(x.dtype), shift.to(x.dtype)  # nets may run in half precision, the flow never

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latent to target, with the coupling's log-determinant `[B]`."""
        x = self.mixing(x)
        x, log_det = coupling_forward(x, *self.net(x, condition), 1 - self.seen)
        return self.actnorm(x), log_det

    def inverse(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Target to latent, with the coupling's log-determinant `[B]`."""
        x = self.actnorm.inverse(x)
        x, log_det = coupling_inverse(x, *self.net(x, condition), 1 - self.seen)
        return self.mixing.inverse(x), log_det


class FlowChain(nn.Module):
    """Steps 0..n-1 in `forward` order."""

    def __init__(self, steps: list[FlowStep]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor, condition: Tensor | None) -> FlowResult:
        """Latent to target."""
        log_dets = []
        for step in self.steps:
            x, log_det = step(x, condition)
            log_dets.append(log_det)
        actnorm, mixing = self._constants(x)
        return FlowResult(x, torch.stack(log_dets), -actnorm, -mixing, x.new_zeros(()))

    def inverse(self, x: Tensor, condition: Tensor | None) -> FlowResult:
        """Target to latent."""
        log_dets: list[Tensor] = []
        for step in reversed(list(self.steps)):
            x, log_det = step.inverse(x, condition)  # type: ignore[operator]
            log_dets.insert(0, log_det)
        actnorm, mixing = self._constants(x)
        return FlowResult(x, torch.stack(log_dets), actnorm, mixing, x.new_zeros(()))

    def fold(self) -> nn.Module:
        """The same chain with constants folded."""
        from hflow_rt.models.hflow.folded import FoldedChain

        return FoldedChain(self)

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input-independent log-determinants of `inverse`: of all actnorms and of all mixings."""
        steps = [step for step in self.steps if isinstance(step, FlowStep)]
        actnorm = torch.stack([step.actnorm.log_det(x) for step in steps]).sum()
        return actnorm, torch.stack([step.mixing.log_det(x) for step in steps]).sum()


class BetweenAffines:
    """`decode` and `encode` of a level: its chain between the start (data side) and end (latent side) affines."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, condition: Tensor | None) -> FlowResult: ...

        def inverse(self, x: Tensor, condition: Tensor | None) -> FlowResult: ...

    def decode(self, z: Tensor, theta: Theta, condition: Tensor) -> FlowResult:
        """Latent to target."""
        theta = theta.to(z.dtype)
        run = self(z * torch.exp(theta.end_log_scale) + theta.end_shift, condition)
        value = run.value * torch.exp(theta.start_log_scale) + theta.start_shift
        return dataclasses.replace(run, value=value, theta=theta.log_det())

    def encode(self, y: Tensor, theta: Theta, condition: Tensor) -> FlowResult:
        """Target to latent."""
        theta = theta.to(y.dtype)
        run = self.inverse((y - theta.start_shift) * torch.exp(-theta.start_log_scale), condition)
        value = (run.value - theta.end_shift) * torch.exp(-theta.end_log_scale)
        return dataclasses.replace(run, value=value, theta=-theta.log_det())


class LevelFlow(BetweenAffines, FlowChain):
    """The flow of an image level."""

    def __init__(self, level: LevelConfig) -> None:
        super().__init__(
            [
                FlowStep(
                    coupling_net(level, split, level.condition_channels),
                    split,
                    level.channels,
                    level.resolution,
                    index,
                    level.mixing_scale,
                    level.unitary,
                )
                for index, split in enumerate(split_steps(level.split, level.steps))
            ]
        )

    def fold(self) -> nn.Module:
        """The same flow with constants folded."""
        from hflow_rt.models.hflow.folded import FoldedLevelFlow

        return FoldedLevelFlow(self)


def end_chain(channels: int, width: int, condition: int | None, steps: int, scale: float, unitary: bool) -> FlowChain:
    """The chain of one part of the end vector, on `[B, C]`."""
    return FlowChain(
        [
            FlowStep(CouplingMLP(channels, width, condition), "channels", channels, 1, index, scale, unitary)
            for index in range(steps)
        ]
    )
