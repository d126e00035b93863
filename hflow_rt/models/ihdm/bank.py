"""Where sampling begins, as a few numbers: the cosine waves that survive the largest blur (spec 14).

A start is `[C, M]`, M waves a channel in units in which the first, the constant wave, is the mean colour in [0, 1].
Starts of training images are the prior: a bank, of which every sample takes one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hflow_rt.models.ihdm.blur import Blur, cosine_basis, damping
from hflow_rt.models.ihdm.config import IHDMConfig

__all__ = ["Waves", "evenly", "known", "surviving"]

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


class Waves(nn.Module):
    """Between blurred images and the waves that survive in them, by products along either axis."""

    low: Tensor
    place: Tensor

    def __init__(self, config: IHDMConfig) -> None:
        super().__init__()
        kept = torch.tensor(surviving(config), device="cpu")
        count = int(kept.max()) + 1
        self.side = config.resolution
        self.register_buffer("low", cosine_basis(config.resolution)[:count], persistent=False)
        # which of the squares of low waves each number is
        grid = torch.eye(count**2, dtype=torch.float64, device="cpu")[kept[:, 0] * count + kept[:, 1]]
        self.register_buffer("place", grid, persistent=False)

    def coefficients(self, images: Tensor) -> Tensor:
        """The waves in blurred images `[B, C, R, R]`, `[B, C, M]`."""
        low = self.low.to(images)
        return (low @ images @ low.T).flatten(2) @ self.place.T.to(images) / self.side

    def rebuilt(self, start: Tensor) -> Tensor:
        """The blurred images `[B, C, R, R]` of starts `[B, C, M]`."""
        low = self.low.to(start)
        grid = (start @ self.place.to(start)).reshape(*start.shape[:2], len(low), len(low))
        found: Tensor = low.T @ grid @ low * self.side
        return found


def known(config: IHDMConfig, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """What is kept of uint8 images `[B, C, R, R]`, N in all, float32: their starts, and moments of their waves.

    Starts `[N, C, M]`; moments `[2, C, R, R]`, mean and variance of every cosine wave.
    """
    blur, kept, basis = Blur(config), Waves(config), cosine_basis(config.resolution)
    starts, sums = list[Tensor](), basis.new_zeros(2, *config.image_shape)
    for pixels in batches:
        images = pixels.to(basis) / 255
        starts.append(kept.coefficients(blur(images, config.steps)).float())
        found = basis @ images @ basis.T
        sums += torch.stack([found.sum(0), found.square().sum(0)])
    mean, square = sums / sum(map(len, starts))
    return torch.cat(starts), torch.stack([mean, (square - mean.square()).clamp(min=0)]).float()


def evenly(starts: Tensor, rows: int) -> Tensor:
    """`rows` of them, as evenly as can be; of fewer, each repeatedly."""
    count, index = len(starts), torch.arange(rows, device="cpu")
    return starts[index % count if rows > count else index * count // rows]
