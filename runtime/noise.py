"""Noise and stds of latents: image `i` of seed `s` is the same in any batch, on any backend, on any machine.

Every image has a counter-based stream of its own (Philox, keyed by seed and image index), from which its
latents are drawn in the order of `shapes`, coarse to fine. Whatever else is random for an image comes from streams of
the same two keys that are told apart by name and step.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from hflow_rt.errors import DataError
from hflow_rt.memory import need

__all__ = ["Stream", "draw", "draw_latents", "draw_noise", "draw_rows", "parse_controls", "parse_std"]

_KEYS = 2**64  # Philox takes two 64-bit words as its key


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Standard normal float32 arrays `[len(indices), *shape]` by name; row k belongs to image `indices[k]`.

    Raises `DataError` for no indices, and for a seed or an index outside 0 .. 2^64 - 1.
    """
    if len(indices) == 0:
        raise DataError("at least one image must be drawn; found 0; ask for 1 or more")
    size = 4 * len(indices) * sum(math.prod(shape) for shape in shapes.values())
    # they are stacked
    need(2 * size, f"the latents of {len(indices):,} images", "take fewer images together (--batch or -n)")
    streams = [_stream(seed, index) for index in indices]
    return {
        name: np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])
        for name, shape in shapes.items()
    }


def draw_latents(
    shapes: Mapping[str, tuple[int, ...]],
    prior_std: Mapping[str, float],  # of each latent at temperature 1
    seed: int,
    indices: Sequence[int],
    std: Mapping[str, float],  # multiplies the prior's, see `parse_std`
) -> dict[str, NDArray[np.float32]]:
    """Latents of the images `indices` of `seed`: `draw` times prior std times std; raises as `draw` does."""
    noise = draw(shapes, seed, indices)
    return {name: values * np.float32(prior_std[name] * std[name]) for name, values in noise.items()}


def draw_noise(
    kind: Literal["noise", "uniform"],
    name: str,
    shape: tuple[int, ...],
    seed: int,
    indices: Sequence[int],
    step: int = 0,
) -> NDArray[np.float32]:
    """The stream `name` at `step`, `[len(indices), *shape]`: standard normal `noise`, or `uniform` in [0, 1)."""
    rows = []
    for index in indices:
        stream = _stream(seed, index, (0, 0, step, _named(name)))
        draw = stream.standard_normal if kind == "noise" else stream.random
        rows.append(draw(shape, dtype=np.float32))
    return np.stack(rows)


def draw_rows(rows: int, seed: int, indices: Sequence[int]) -> NDArray[np.int64]:
    """For each image the row that it has of a table with `rows`, `[len(indices)]`."""
    return np.array([_stream(seed, index, (0, 0, 0, _named("bank"))).integers(rows) for index in indices])


class Stream(NDArrayOperatorsMixin):
    """Draws of the images `indices` for the steps 0 .. `steps` - 1 of a loop, an array `[B, steps, *shape]`.

    It is made a step at a time by who asks for one, and as a whole only where numpy needs the values.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        kind: Literal["noise", "uniform"],
        name: str,
        shape: tuple[int, ...],
        seed: int,
        indices: Sequence[int],
        steps: int,
    ) -> None:
        self._what, self._seed, self._indices, self._steps = (kind, name, shape), seed, indices, steps
        self.shape = (len(indices), steps, *shape)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._indices)

    def step(self, index: int) -> NDArray[np.float32]:
        """The draws `[B, *shape]` of one step."""
        return draw_noise(*self._what, self._seed, self._indices, index)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            return Stream(*self._what, self._seed, self._indices[rows], self._steps)
        return np.asarray(self)[rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        need(8 * math.prod(self.shape), f"the noise of {len(self):,} images", "take fewer images together (--batch)")
        return np.stack([self.step(index) for index in range(self._steps)], 1).astype(dtype or self.dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **settings: Any) -> Any:
        made = (np.asarray(value) if isinstance(value, Stream) else value for value in inputs)
        return getattr(ufunc, method)(*made, **settings)


def parse_std(values: float | str | Sequence[str] | Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The std of every latent in `names` from a number, a mapping, or texts like `0.7` and `name=0.5`.

    A plain number sets all levels, later texts override earlier ones, and what nothing sets is 1.
    Raises `DataError` for an unknown name and for anything that is not a finite number above zero.
    """
    names = list(names)
    entries: list[tuple[str | None, float | str]]
    if isinstance(values, Mapping):
        entries = list(values.items())
    elif isinstance(values, str):
        entries = [_split(values)]
    elif isinstance(values, Sequence):
        entries = [_split(text) for text in values]
    else:
        entries = [(None, values)]

    stds = dict.fromkeys(names, 1.0)
    for name, number in entries:
        if name is not None and name not in stds:
            raise DataError(f"unknown latent '{name}' in std; the latents of this model are {', '.join(names)}")
        stds.update(dict.fromkeys(names if name is None else [name], _positive(name, number, names)))
    return stds


def parse_controls(texts: Iterable[str]) -> dict[str, float]:
    """`NAME=VALUE` each; the last of a name counts. Raises `DataError`."""
    found = {}
    for text in texts:
        name, number = _split(text)
        try:
            found[str(name)] = float(number)
        except ValueError as error:
            raise DataError(f"a control is NAME=NUMBER; found '{text}'") from error
        if name is None:
            raise DataError(f"a control is NAME=NUMBER; found '{text}'")
    return found


def _split(text: str) -> tuple[str | None, str]:
    name, equals, number = text.partition("=")
    return (name.strip(), number) if equals else (None, text)


def _positive(name: str | None, number: float | str, names: Sequence[str]) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:  # NaN fails both comparisons
        found = number if name is None else f"{name}={number}"
        raise DataError(
            f"std must be a finite number > 0; found '{found}'; "
            f"give a number, or NAME=NUMBER for one of the latents {', '.join(names)}"
        )
    return value


def _named(name: str) -> int:
    """The last word of a counter; that of the latents is 0."""
    return 1 + zlib.crc32(name.encode())


def _stream(seed: int, index: int, counter: Sequence[int] = (0, 0, 0, 0)) -> np.random.Generator:
    for what, value in (("seed", seed), ("image index", index)):
        if not 0 <= value < _KEYS:
            raise DataError(f"{what} must be in 0 .. 2^64 - 1; found {value}; choose another")
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64)))
