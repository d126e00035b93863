"""The forward process (spec 2): heat flows for a while inside the frame, which damps cosine waves.

In the cosine basis level k multiplies frequency (f, g) by `damping[k, f] * damping[k, g]`; as an outer product this is
two small matrix products, `B_k X B_k`. Tables are made in float64 and used in the precision of the images.
"""

import math

import torch
from torch import Tensor

from hflow_rt.errors import ConfigError
from hflow_rt.models.ihdm.config import IHDMConfig

__all__ = ["Blur", "blur_lengths", "cosine_basis", "damped", "damping"]


def blur_lengths(config: IHDMConfig) -> Tensor:
    """Blur in pixels of every level, float64 `[K + 1]`: 0, then geometric from `blur_min` to `blur_max`."""
    ends = math.log(config.blur_min), math.log(config.blur_max)
    rising = torch.linspace(*ends, config.steps, dtype=torch.float64, device="cpu").exp()
    rising[0], rising[-1] = config.blur_min, config.blur_max
    return torch.cat([rising.new_zeros(1), rising])


def cosine_basis(side: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) as a matrix, float64 `[frequency, pixel]`."""
    index = torch.arange(side, dtype=torch.float64, device="cpu")
    basis = (math.pi / (2 * side) * index[:, None] * (2 * index + 1)).cos() * math.sqrt(2 / side)
    basis[0] = math.sqrt(1 / side)
    return basis


def damping(config: IHDMConfig) -> Tensor:
    """What every level multiplies the frequencies of one axis by, float64 `[K + 1, R]`."""
    frequency = torch.arange(config.resolution, dtype=torch.float64, device="cpu") * (math.pi / config.resolution)
    return torch.exp(-(frequency**2) * blur_lengths(config)[:, None] ** 2 / 2)


def damped(images: Tensor, basis: Tensor, damping: Tensor) -> Tensor:
    """Images whose waves are multiplied by `damping` along both axes: `[R]` or `[1, R]`, or `[B, 1, 1, R]` by image."""
    matrix = (basis.T * damping) @ basis
    return matrix @ images @ matrix


class Blur:
    """Blurs images to levels of the schedule. Its tables are made when they are first needed."""

    def __init__(self, config: IHDMConfig) -> None:
        self.config = config
        self._table: Tensor | None = None  # in the device and precision that were asked for last

    def table(self, like: Tensor) -> Tensor:
        """The matrices `B_k`, `[K + 1, R, R]` in the precision and on the device of `like`."""
        if self._table is None or self._table.dtype != like.dtype or self._table.device != like.device:
            basis = cosine_basis(self.config.resolution)
            self._table = ((basis.T * damping(self.config)[:, None]) @ basis).to(like)
        return self._table

    def __call__(self, images: Tensor, level: Tensor | int) -> Tensor:
        """Images `[B, C, R, R]` at one level, or each at its own: int64 `[B]`. Raises `ConfigError` for others."""
        if isinstance(level, int) or not level.is_cuda:  # of a GPU to ask would be to wait for it
            found = [level] if isinstance(level, int) else level.tolist()
            if not 0 <= min(found) <= max(found) <= self.config.steps:
                strange = next(one for one in found if not 0 <= one <= self.config.steps)
                raise ConfigError(f"a level of blur must be in 0 .. {self.config.steps}; found {strange}")
        matrices = self.table(images)[level]
        if matrices.dim() == 3:
            matrices = matrices[:, None]
        return matrices @ images @ matrices
