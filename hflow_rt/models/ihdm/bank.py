"""Where sampling begins, as a few numbers: the cosine waves that survive the largest blur (spec 14).

A start is `[C, M]`, M waves a channel in units in which the first, the constant wave, is the mean colour in [0, 1].
Starts of training images are the prior: a bank, of which every sample takes one.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hflow_rt.models.ihdm.blur import Blur, cosine_basis, damping
from hflow_rt.models.ihdm.config import IHDMConfig

__all__ = ["coefficients", "evenly", "known", "rebuilt", "surviving", "waves"]

_TOLERANCE = 1e-6  # of a pixel, for any image: far below the noise that is added to it


def surviving(config: IHDMConfig) -> list[tuple[int, int]]:
    """Frequencies (row, column) of the waves that are kept, from the longest to the shortest.

    As few with `row^2 + column^2` up to some number as rebuild the blurred image of any image in [0, 1] to 1e-6.
    """
    basis, left = cosine_basis(config.resolution).abs(), damping(config)[-1]
    # how much a wave of an image of 0s and 1s can contribute to a pixel: half, because all but the mean have no mean
    reach = left * basis.amax(1) * basis.sum(1)
    each = 0.5 * reach[:, None] * reach
    squares = torch.arange(config.resolution, device="cpu") ** 2
    radius = squares[:, None] + squares
    for enough in torch.unique(radius):
        if each[radius > enough].sum() <= _TOLERANCE:
            break
    kept = (radius <= enough).nonzero()
    return sorted(map(tuple, kept.tolist()), key=lambda wave: (wave[0] ** 2 + wave[1] ** 2, wave))


def waves(config: IHDMConfig) -> Tensor:
    """What one unit of every surviving wave adds to the pixels, float64 `[M, R * R]`."""
    basis, kept = cosine_basis(config.resolution), torch.tensor(surviving(config), device="cpu")
    products = basis[kept[:, 0], :, None] * basis[kept[:, 1], None, :]
    return products.flatten(1) * config.resolution


def coefficients(images: Tensor, waves: Tensor) -> Tensor:
    """The waves in blurred images `[B, C, R, R]`, `[B, C, M]`."""
    # the waves are orthogonal, and each has the norm R
    return images.flatten(2) @ waves.to(images).T / math.prod(images.shape[2:])


def rebuilt(start: Tensor, waves: Tensor) -> Tensor:
    """The blurred images `[B, C, R, R]` of starts `[B, C, M]`."""
    side = math.isqrt(waves.shape[1])
    return (start @ waves.to(start)).reshape(*start.shape[:2], side, side)


def known(config: IHDMConfig, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """What is kept of uint8 images `[B, C, R, R]`, N in all, float32: their starts, and moments of their waves.

    Starts `[N, C, M]`; moments `[2, C, R, R]`, mean and variance of every cosine wave.
    """
    blur, kept, basis = Blur(config), waves(config), cosine_basis(config.resolution)
    starts, sums = list[Tensor](), basis.new_zeros(2, *config.image_shape)
    for pixels in batches:
        images = pixels.to(basis) / 255
        starts.append(coefficients(blur(images, config.steps), kept).float())
        found = basis @ images @ basis.T
        sums += torch.stack([found.sum(0), found.square().sum(0)])
    mean, square = sums / sum(map(len, starts))
    return torch.cat(starts), torch.stack([mean, (square - mean.square()).clamp(min=0)]).float()


def evenly(starts: Tensor, rows: int) -> Tensor:
    """`rows` of them, as evenly as can be; of fewer, each repeatedly."""
    count, index = len(starts), torch.arange(rows, device="cpu")
    return starts[index % count if rows > count else index * count // rows]
