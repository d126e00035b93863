"""What linear algebra knows of an image from its blurred state: the Wiener filter, wave by wave.

Waves of the data with mean and variance (mu, S), damped by E and in white noise of variance sigma^2, are seen as w. The
linear estimate of the same wave damped by F is `mu F + g (w - mu E)`, `g = S E F / (S E^2 + sigma^2)`, and what it
misses has the variance `S F^2 sigma^2 / (S E^2 + sigma^2)`. A network that corrects it need not learn to take the noise
away, and in units of what is missed corrections are of one size at all levels.
"""

from typing import NamedTuple

from torch import Tensor

__all__ = ["LinearEstimate", "linear_estimate"]


_LEAST = 1e-6  # of what is missed: images that are all the same leave nothing


class LinearEstimate(NamedTuple):
    """Of the image one level sharper and of the sharp one, `[B, C, R, R]`; the rms of what the first misses."""

    sharper: Tensor
    sharp: Tensor
    missed: Tensor


def linear_estimate(
    u: Tensor, damping: Tensor, reached: Tensor, basis: Tensor, moments: Tensor, sigma: float
) -> LinearEstimate:
    """From states `[B, C, R, R]` in noise of `sigma`.

    damping, reached: of the states and one level sharper along an axis, `[B or 1, R]`. basis: `[R, R]`. moments: mean
    and variance of waves, `[2, C, R, R]`.
    """
    mean, variance = moments
    left, further = (axis[:, None, :, None] * axis[:, None, None, :] for axis in (damping, reached))
    seen = variance * left.square() + sigma**2
    waves = mean + variance * left / seen * (basis @ u @ basis.T - mean * left)
    missed = variance * further.square() * (sigma**2 / seen)
    rms = missed.mean((1, 2, 3), keepdim=True).sqrt().clamp(_LEAST)
    return LinearEstimate(basis.T @ (further * waves) @ basis, basis.T @ waves @ basis, rms)
