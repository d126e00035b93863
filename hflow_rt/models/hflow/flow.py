"""Flow steps and the chain of a level (spec 2.11): `forward` is latent to target, `inverse` target to latent."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hflow_rt.kernels.channels import Elementwise
from hflow_rt.kernels.coupling import Region, coupling_forward, coupling_inverse
from hflow_rt.kernels.dispatch import takes
from hflow_rt.layers.actnorm import ActNorm
from hflow_rt.layers.masks import Split, seen_mask, split_steps, transformed
from hflow_rt.layers.mixing import FreeMixing, UnitaryMixing
from hflow_rt.models.hflow.boundaries import Boundary, boundaries, run_fused
from hflow_rt.models.hflow.config import LevelConfig
from hflow_rt.models.hflow.coupling import CouplingMLP, coupling_net

__all__ = [
    "SEEN_GAIN",
    "BetweenAffines",
    "Coupling",
    "FlowChain",
    "FlowResult",
    "FlowStep",
    "LevelFlow",
    "Theta",
    "end_chain",
]

# Restores the variance of a half-masked input. The original keeps it in float32 masks, hence sqrt(2) rounded to
# float32: in float64 the difference shows (4e-6 relative on overdriven samples).
SEEN_GAIN = float(np.float32(math.sqrt(2)))


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


class Coupling(Protocol):
    """What a step is to the kernels: where it couples, and the net that says how."""

    region: Region

    def raw(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift, as the net gives them."""


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
        self.region = transformed(split, channels, resolution, index)
        self.register_buffer("seen", seen_mask(split, channels, resolution, index), persistent=False)

    def raw(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift from the seen half of `x`, whose variance sqrt(2) restores, as the net gives them."""
        seen = x * (self.seen * SEEN_GAIN)
        if self.split in ("vhalfs", "hhalfs"):
            seen = seen.flip(3 if self.split == "vhalfs" else 2)
        log_scale, shift = self.coupling(seen, condition)
        return log_scale, shift

    def net(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """`raw` in the precision of `x`: nets may run in half precision, the flow never."""
        log_scale, shift = self.raw(x, condition)
        return log_scale.to(x.dtype), shift.to(x.dtype)

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
        return self.result(x, log_dets, inverse=False)

    def inverse(self, x: Tensor, condition: Tensor | None) -> FlowResult:
        """Target to latent."""
        log_dets: list[Tensor] = []
        for step in reversed(list(self.steps)):
            x, log_det = step.inverse(x, condition)  # type: ignore[operator]
            log_dets.insert(0, log_det)
        return self.result(x, log_dets, inverse=True)

    def result(self, x: Tensor, log_dets: list[Tensor], inverse: bool) -> FlowResult:
        """`x` with the log-determinants of the couplings, by step, and those that no input changes."""
        steps = self.stages()
        actnorm = torch.stack([step.actnorm.log_det(x) for step in steps]).sum()
        mixing = torch.stack([step.mixing.log_det(x) for step in steps]).sum()
        constants = (actnorm, mixing) if inverse else (-actnorm, -mixing)
        return FlowResult(x, torch.stack(log_dets), *constants, x.new_zeros(()))

    def stages(self) -> list[FlowStep]:
        """Steps by index."""
        return [step for step in self.steps if isinstance(step, FlowStep)]

    def maps(self, inverse: bool) -> list[Boundary]:
        """The channel maps around the couplings, in the order of running."""
        return [boundary.to(torch.float32) for boundary in boundaries(self.stages())[inverse]]

    def whole(self) -> bool:
        """Whether the boundaries are known: an actnorm that is to be initialised from its input has to see it."""
        return not any(step.actnorm.initializing for step in self.stages())


class BetweenAffines:
    """`decode` and `encode` of a level: its chain between the start (data side) and end (latent side) affines.

    Where the kernels take the input, couplings run with the maps around them fused; else step by step.
    """

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, condition: Tensor | None) -> FlowResult: ...

        def inverse(self, x: Tensor, condition: Tensor | None) -> FlowResult: ...

        def result(self, x: Tensor, log_dets: list[Tensor], inverse: bool) -> FlowResult: ...

        def stages(self) -> Sequence[Coupling]: ...

        def maps(self, inverse: bool) -> list[Boundary]: ...

        def whole(self) -> bool: ...

    def decode(self, z: Tensor, theta: Theta, condition: Tensor) -> FlowResult:
        """Latent to target."""
        if self._fuses(z):
            return self._fused(z, theta, condition, inverse=False)
        theta = theta.to(z.dtype)
        run = self(z * torch.exp(theta.end_log_scale) + theta.end_shift, condition)
        value = run.value * torch.exp(theta.start_log_scale) + theta.start_shift
        return dataclasses.replace(run, value=value, theta=theta.log_det())

    def encode(self, y: Tensor, theta: Theta, condition: Tensor) -> FlowResult:
        """Target to latent."""
        if self._fuses(y):
            return self._fused(y, theta, condition, inverse=True)
        theta = theta.to(y.dtype)
        run = self.inverse((y - theta.start_shift) * torch.exp(-theta.start_log_scale), condition)
        value = (run.value - theta.end_shift) * torch.exp(-theta.end_log_scale)
        return dataclasses.replace(run, value=value, theta=-theta.log_det())

    def _fuses(self, x: Tensor) -> bool:
        return takes(x) and x.dtype == torch.float32 and self.whole()

    def _fused(self, x: Tensor, theta: Theta, condition: Tensor, inverse: bool) -> FlowResult:
        way = -1 if inverse else 1
        theta = theta.to(x.dtype)
        couplings = self.stages()[::way]
        ends = (Elementwise(*theta[2:]), Elementwise(*theta[:2]))[::way]
        nets, regions = [step.raw for step in couplings], [step.region for step in couplings]
        value, log_dets = run_fused(x, condition, nets, regions, self.maps(inverse), inverse, *ends)
        theta_log_det = way * theta.log_det()
        return dataclasses.replace(self.result(value, log_dets[::way], inverse), theta=theta_log_det)


class LevelFlow(FlowChain, BetweenAffines):
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


def end_chain(channels: int, width: int, condition: int | None, steps: int, scale: float, unitary: bool) -> FlowChain:
    """The chain of one part of the end vector, on `[B, C]`."""
    return FlowChain(
        [
            FlowStep(CouplingMLP(channels, width, condition), "channels", channels, 1, index, scale, unitary)
            for index in range(steps)
        ]
    )
