"""Images to latents and back, in calls of one fixed number of images.

How an engine rounds may depend on how many images it is given together. Loops, which may make much of little, are
therefore filled up: what becomes of an image is then the same whatever else is encoded or decoded, and in any order.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from hflow_rt.memory import need
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.operations import Latents, concatenate
from hflow_rt.runtime.session import LATENT_SPACE, Array, Encoded, Session

__all__ = ["BATCH", "RoundTrip", "decoded", "encoded", "round_trip", "together"]

BATCH = 16  # images per call: more is hardly faster on a CPU, and this fits beside a large model
_BYTES = 1 << 28  # of latents of one call

Track = Callable[[Sequence[range]], Iterable[range]]


class RoundTrip(BaseModel):
    """How images came back from their latents on `backend`, in calls of `batch` images.

    largest_difference: of each image, in 8-bit levels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str
    batch: Annotated[int, Field(ge=1, le=BATCH)]
    largest_difference: tuple[int, ...]

    @property
    def exact(self) -> int:
        """How many came back in every 8-bit value."""
        return self.largest_difference.count(0)

    def words(self, names: Sequence[str] = ()) -> str:
        """For example `3 of 4 images come back in every 8-bit value on torch cpu; a.png differs by up to 76 of 255`."""
        off = self.largest_difference
        worst = f"; {[*names, 'one'][int(np.argmax(off)) if names else 0]} differs by up to {max(off)} of 255"
        what = f"{self.exact} of {len(off)} images come back in every 8-bit value on {self.backend}"
        return what + (worst if any(off) else "")


def together(session: Session, count: int) -> int:
    """How many of `count` images are encoded in one call: as many as may be, all calls nearly full."""
    each = 4 * sum(math.prod(shape) for shape in session.input_shapes.values())
    calls = math.ceil(count / max(1, min(BATCH, _BYTES // each)))
    return math.ceil(count / calls)


def encoded(
    session: Session,
    pixels: Array,
    conditions: Mapping[str, Array],
    controls: Mapping[str, float] | None = None,
    track: Track = lambda parts: parts,
    **how: Any,
) -> Encoded:
    """Images `[N, C, R, R]` in [0, 1], `inverse` of `together` at a time; `track` sees the parts go by.

    how: further arguments of `Session.inverse`.
    """
    size = 8 * len(pixels) * sum(math.prod(shape) for shape in session.input_shapes.values())
    need(size, f"the latents of {len(pixels):,} images", "encode fewer together")
    batch, parts = together(session, len(pixels)), []
    for rows in track(_parts(len(pixels), batch)):
        taken = _taken(session, rows, batch)
        given = {name: values[taken] for name, values in conditions.items()}
        found = session.inverse(pixels[taken], given, controls, first=rows.start, **how)
        parts.append([_cut(values, len(rows)) for values in (found.latents, found.scores)])
    latents, scores = zip(*parts, strict=True)
    return Encoded(concatenate(latents), concatenate(scores))


def decoded(
    session: Session,
    latents: Latents,
    controls: Mapping[str, float] | None = None,
    batch: int = BATCH,
    track: Track = lambda parts: parts,
    space: str = LATENT_SPACE,
) -> Iterator[Array]:
    """Images `[n, C, R, R]` of latents `[N, *shape]`, or of values of another space, `batch` at a time."""
    count = len(next(iter(latents.values())))
    for rows in track(_parts(count, batch)):
        taken = _taken(session, rows, batch)
        part = {name: values[taken] for name, values in latents.items()}
        yield session.decode(space, part, controls)[: len(rows)]


def round_trip(
    session: Session,
    pixels: Array,
    latents: Latents,
    controls: Mapping[str, float] | None = None,
    track: Track = lambda parts: parts,
) -> RoundTrip:
    """Decode what was `encoded` of images `[N, C, R, R]`, with the same controls."""
    batch = together(session, len(pixels))
    back = np.concatenate([to_uint8(part) for part in decoded(session, latents, controls, batch, track)])
    off = np.abs(back.astype(int) - to_uint8(pixels)).reshape(len(pixels), -1).max(1)
    return RoundTrip(backend=session.backend, batch=batch, largest_difference=tuple(off.tolist()))


def _parts(count: int, batch: int) -> list[range]:
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


def _taken(session: Session, rows: range, batch: int) -> NDArray[np.int64]:
    """The images of a call: `rows`, in a loop repeated at the end to make `batch`."""
    return np.minimum(np.arange(rows.start, rows.start + batch if session.steps > 1 else rows.stop), rows.stop - 1)


def _cut(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {name: array[:count] for name, array in values.items()}
