"""Images as points: one tensor of their latents, found by name, and the nearest among many."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError
from hflow_rt.limits import check_count
from hflow_rt.runtime.session import LATENT_SPACE, Array, Session

__all__ = ["Nearest", "TensorAddress", "find_tensor", "points"]


@dataclass(frozen=True)
class TensorAddress:
    """Tensor `name` of `space`, see `Session.into_space`."""

    space: str
    name: str

    @property
    def only(self) -> str | None:
        """The one latent that it is; None for a tensor of another space."""
        return self.name if self.space == LATENT_SPACE else None


def find_tensor(session: Session, name: str | None = None) -> TensorAddress:
    """Where the tensor called `name` is: a latent, or a tensor of another space of the family.

    Without a name it is what says most about the image as a whole: the last tensor of the first other space
    where the family has one, else the coarsest latent.
    Raises `DataError` for a name that nothing has.
    """
    shapes = session.latent_shapes
    if name in shapes:  # first, because a bundle of one route lacks the other spaces
        return TensorAddress(LATENT_SPACE, name)
    addresses = {latent: TensorAddress(LATENT_SPACE, latent) for latent in shapes}
    others = [
        TensorAddress(space, tensor)
        for space in session.manifest.spaces
        for tensor in session.space_shapes(space)
        if tensor not in shapes
    ]
    for address in others:
        addresses.setdefault(address.name, address)
    if name is None:
        first = [address for address in others if address.space == others[0].space]
        return first[-1] if first else addresses[next(iter(shapes))]
    if name not in addresses:
        raise DataError(f"nothing is called '{name}' in this model; choose among {', '.join(addresses)}")
    return addresses[name]


def points(session: Session, values: Mapping[str, Array], address: TensorAddress, space: str = LATENT_SPACE) -> Array:
    """The tensor at `address` of these values of `space`, as vectors `[B, D]`.

    Raises `DataError` where the space is neither the latents' own nor that of the tensor.
    """
    if space not in (LATENT_SPACE, address.space):
        raise DataError(f"'{address.name}' is in space {address.space}, which nothing leads to from space {space}")
    known = values if address.space == space else session.into_space(address.space, values)
    found: Array = known[address.name]
    return found.reshape(len(found), -1)


class Nearest:
    """The k points nearest to each of Q queries by Euclidean distance, from points that come in batches.

    Of equally near points the earlier stands first. `indices` counts points in the order they came.
    """

    def __init__(self, queries: Array, k: int) -> None:
        check_count("the number of neighbours", k)
        self._queries = queries.reshape(len(queries), -1).astype(np.float64)
        self._k, self._seen = k, 0
        self.indices = np.empty((len(queries), 0), np.int64)  # [Q, k], nearest first; fewer while points are
        self.distances = np.empty((len(queries), 0))

    def add(self, points: Array) -> None:
        """Consider the points `[B, ...]`, of as many values each as a query."""
        flat = points.reshape(len(points), -1)
        # differences, not |a|^2 - 2ab + |b|^2: a point is at distance 0 of itself, not at the root of a rounding
        found = np.stack([np.linalg.norm(flat - query, axis=1) for query in self._queries])
        numbers = np.broadcast_to(np.arange(self._seen, self._seen + len(flat)), found.shape)
        distances = np.concatenate([self.distances, found], axis=1)
        indices = np.concatenate([self.indices, numbers], axis=1)
        order: NDArray[np.intp] = np.argsort(distances, axis=1, kind="stable")[:, : self._k]
        self.distances = np.take_along_axis(distances, order, axis=1)
        self.indices = np.take_along_axis(indices, order, axis=1)
        self._seen += len(flat)
