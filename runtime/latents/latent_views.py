"""What the latents of a model hold, shown: walks, redrawn and zeroed latents, seeds side by side, mixed styles.

Every function takes a `Session` and yields float32 images `[B, C, R, R]` in [0, 1] a batch at a time, so that
memory stays flat. Latents are those of `hflow_rt.runtime.latents.operations`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError
from hflow_rt.limits import check_count
from hflow_rt.memory import need
from hflow_rt.runtime.latents.operations import Latents, Way, concatenate, interpolate, mix, path_by, random_walk
from hflow_rt.runtime.latents.round_trips import BATCH
from hflow_rt.runtime.session import LATENT_SPACE, Array, Session, Stds

__all__ = [
    "RunningStd",
    "batches",
    "between",
    "coarse_down_to",
    "count",
    "heat_map",
    "latents_of_seeds",
    "parse_seeds",
    "repeat",
    "samples",
    "select",
    "slots_mixed",
    "stepped",
    "style_row",
    "styled",
    "temperatures",
    "walk",
    "way_in",
    "zeroed",
    "zeroing",
]

_OTHERS = 1 << 40  # image numbers from here on are nobody's samples
_MANY = 4096  # seeds, more than any picture shows
_SEEDS = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?")


def select(latents: Latents, start: int, stop: int | None = None) -> dict[str, Array]:
    """Items `start` .. `stop` - 1 of a batch; without `stop` the one item `start`, as a batch of 1."""
    return {name: values[start : start + 1 if stop is None else stop] for name, values in latents.items()}


def repeat(latents: Latents, times: int) -> dict[str, Array]:
    """A batch of 1 as a batch of `times` equal items."""
    return {name: np.repeat(values, times, axis=0) for name, values in latents.items()}


def count(latents: Latents) -> int:
    """How many items a batch has."""
    return len(next(iter(latents.values())))


def batches(latents: Latents, size: int = BATCH) -> Iterator[dict[str, Array]]:
    """A batch in parts of at most `size`."""
    for start in range(0, count(latents), size):
        yield select(latents, start, start + size)


def samples(
    session: Session, number: int, std: Stds | None = None, seed: int = 0, option: str | None = None
) -> dict[str, Array]:
    """Latents of the images 0 .. number - 1 of `seed`, one batch, drawn as `Session.draw` does. Raises `DataError`."""
    size = 16 * number * sum(math.prod(shape) for shape in session.input_shapes.values())
    need(size, f"the latents of {number:,} images", "ask for fewer (-n)")
    return concatenate(list(session.draw(range(number), std, seed, option=option)))


def between(
    session: Session,
    ends: Latents,
    frames: int,
    mode: str = "lerp",
    space: str = LATENT_SPACE,
    *,
    entered: bool = False,
) -> Iterator[Array]:
    """Images `[n, C, R, R]`, `frames` of them in all, from the first of two items to the second through `space`.

    entered: whether the items are values of that space already. Raises `DataError` as `interpolate` does.
    """
    there = ends if entered else session.into_space(space, ends)
    first, last = (select(there, index) for index in (0, 1))
    path = interpolate(first, last, frames, mode, session.joined(space), *_ways(session))
    return _decoded(session, space, path, 1)


def way_in(session: Session, space: str, mode: str) -> Way:
    """The way through `space` that `between` takes, see `path_by`. Raises `DataError`."""
    return path_by(mode, session.joined(space), *_ways(session))


def walk(
    session: Session,
    paths: int,
    keyframes: int,
    frames_per_segment: int,
    *,
    std: Stds | None = None,
    seed: int = 0,
    closed: bool = True,
    mode: str = "slerp",
    space: str = "z",
    fixed: Iterable[str] = (),
    option: str | None = None,
) -> Iterator[Array]:
    """Frames `[paths, C, R, R]` of as many independent walks through random keyframes, see `random_walk`.

    Path p passes through the images p * keyframes .. (p + 1) * keyframes - 1 of `seed`, drawn as `Session.draw` does;
    between them it moves in `space`, whose names `fixed` takes. Raises `DataError` before the first frame.
    """
    check_count("the number of walks", paths)
    check_count("the number of keyframes", keyframes)
    check_count("the number of frames", frames_per_segment)
    shapes = session.input_shapes.values()
    size = 4 * paths * keyframes * sum(math.prod(shape) for shape in shapes)
    need(size, f"{keyframes:,} keyframes of {paths:,} walks", "ask for fewer")
    keys = []
    for key in range(keyframes):
        drawn = concatenate(list(session.draw(range(key, paths * keyframes, keyframes), std, seed, option=option)))
        keys.append(session.into_space(space, drawn))
    frames = random_walk(keys, frames_per_segment, closed, mode, session.joined(space), fixed, *_ways(session))
    return _decoded(session, space, frames, paths)


def stepped(
    session: Session,
    pairs: range,
    share: float,
    std: Stds | None = None,
    seed: int = 0,
    controls: Mapping[str, float] | None = None,
) -> tuple[Array, Array]:
    """Images `[n, C, R, R]` of the first sample of each pair, and at `share` of the way to the second.

    Pair p is image p of `seed` and one that is nobody's sample, of the same conditions. The way is a line in the space
    of slots of a model that has one, else the arc of latents. Raises `DataError`.
    """
    space = space_of_slots(session) or LATENT_SPACE
    firsts, seconds = (
        concatenate(list(session.draw(range(pairs.start + first, pairs.stop + first), std, seed)))
        for first in (0, _OTHERS)
    )
    seconds |= {name: firsts[name] for name in session.conditions}
    begin, end = (session.into_space(space, drawn) for drawn in (firsts, seconds))
    mode = "slerp" if space == LATENT_SPACE else "lerp"
    moved = way_in(session, space, mode)(begin, end, share)
    first, second = (
        np.concatenate([session.decode(space, part, controls) for part in batches(values)]) for values in (begin, moved)
    )
    return first, second


def _ways(session: Session) -> tuple[list[str], list[str]]:
    """What goes in a line in any mode, and what by cosine and sine."""
    return [*session.conditions, *session.ways("line")], session.ways("arc")


def _decoded(session: Session, space: str, frames: Iterator[dict[str, Array]], paths: int) -> Iterator[Array]:
    together = max(1, BATCH // paths)
    for first in frames:
        part = [first, *islice(frames, together - 1)]
        images = session.decode(space, concatenate(part))
        yield from np.split(images, len(part))


class RunningStd:
    """Standard deviation over items that come in batches, of which none is kept; float64 inside."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: NDArray[np.float64] | float = 0.0
        self._squares: NDArray[np.float64] | float = 0.0  # sum of squared distances to the mean

    def add(self, batch: Array) -> None:
        """Count the items of `batch` `[B, ...]` in."""
        values = batch.astype(np.float64)
        mean, total = values.mean(0), self.count + len(values)
        shift = mean - self._mean
        self._squares = self._squares + ((values - mean) ** 2).sum(0) + shift**2 * self.count * len(values) / total
        self._mean = self._mean + shift * len(values) / total
        self.count = total

    @property
    def std(self) -> NDArray[np.float64]:
        """`[...]`, of the items so far as a whole population."""
        return np.sqrt(np.asarray(self._squares) / max(self.count, 1))


def heat_map(
    session: Session,
    base: Latents,
    name: str,
    draws: int = 32,
    *,
    std: Stds | None = None,
    seed: int = 0,
    first: int = 1,
    batch: int = BATCH,
) -> NDArray[np.float64]:
    """How much each pixel depends on latent `name`: `[R, R]`, the std of its colour over `draws` redraws of that
    latent alone, averaged over the channels, all others being as in `base` (a batch of 1).

    The redraws, at std 1 by default, are those of the images `first` .. `first` + draws - 1 of `seed`: a base of the
    same seed must be an image before them, because one that is its own redraw makes the std too small. Raises
    `DataError`.
    """
    if draws < 2:
        raise DataError(f"a heat map needs at least 2 redraws, not {draws}")
    check_count("the number of redraws", draws)
    seen = RunningStd()
    std = 1.0 if std is None and session.drawing.scaled else std
    for drawn in session.draw(range(first, first + draws), std, seed, batch):
        seen.add(session.forward(mix(repeat(base, len(drawn[name])), drawn, [name])))
    mean: NDArray[np.float64] = seen.std.mean(0)
    return mean


def zeroing(session: Session, latents: Latents) -> Iterator[tuple[tuple[str, ...], Array]]:
    """The images of `latents`, then again and again with one level more set to zero, fine to coarse.

    What is drawn from a bank of images becomes their mean. Yields the names that are zero, finest first, with the
    images `[B, C, R, R]`: first none, last all.
    """
    current, zero = dict(latents), tuple[str, ...]()
    yield zero, _images(session, current)
    for name in reversed(session.levels):
        current[name] = zeroed(session, name, latents[name])
        zero = (*zero, name)
        yield zero, _images(session, current)


def zeroed(session: Session, name: str, values: Array) -> Array:
    """The values of latent `name` that say nothing: zero, of a bank of images their mean."""
    return _scaled(session, name, values, 0)


def temperatures(
    session: Session, latents: Latents, factors: Iterable[float], control: str | None = None
) -> Iterator[Array]:
    """The images `[B, C, R, R]` of `latents` times each of `factors`: 1 leaves them, 0 is the mean of the prior.

    control: gets the factors instead. Raises `DataError` for latents that have no temperature.
    """
    if control is not None:
        for factor in factors:
            yield np.concatenate([session.forward(part, {control: factor}) for part in batches(latents)])
        return
    if all(latent.prior == "unscaled" for latent in session.manifest.latents):
        have = f"; give a control the values, --of {next(iter(session.controls))}" if session.controls else ""
        raise DataError(f"no temperature applies to the latents of this {session.manifest.family} model{have}")
    for factor in factors:
        scaled = {name: _scaled(session, name, latents[name], factor) for name in session.levels}
        yield _images(session, dict(latents) | scaled)


def _scaled(session: Session, name: str, values: Array, factor: float) -> Array:
    """Their distance to the mean of the prior times `factor`; that of a bank is the mean of its rows."""
    bank = {} if session.manifest.bank is None else session.drawing.table(session.manifest.bank)
    mean = bank[name].mean(0) if name in bank else np.float32(0)
    return np.asarray(mean + np.float32(factor) * (values - mean), np.float32)


def latents_of_seeds(
    session: Session, seeds: Sequence[int], std: Stds | None = None, option: str | None = None
) -> dict[str, Array]:
    """Latents of image 0 of each of `seeds`, one batch, drawn as `Session.draw` does. Raises `DataError`."""
    return concatenate([next(session.draw([0], std, seed, option=option)) for seed in seeds])


def parse_seeds(texts: Iterable[str]) -> list[int]:
    """Seeds named as `7`, `0-15` (both included), or several of these with commas between, in their order.

    Raises `DataError` for anything else, for a range that goes down, for none and for more than 4096.
    """
    seeds: list[int] = []
    for text in (part.strip() for words in texts for part in words.split(",")):
        match = _SEEDS.fullmatch(text)
        if match is None:
            raise DataError(f"seeds are numbers and ranges such as 7 or 0-15; found '{text}'")
        start, stop = int(match[1]), int(match[2] or match[1])
        if stop < start:
            raise DataError(f"a range of seeds goes up; found '{text}'; write {stop}-{start}")
        if len(seeds) + stop - start >= _MANY:
            raise DataError(f"at most {_MANY} seeds fit a picture; '{text}' goes beyond; name fewer")
        seeds += range(start, stop + 1)
    if not seeds:
        raise DataError("at least one seed must be named, e.g. 0-15; found none")
    return seeds


def coarse_down_to(session: Session, cut: str | None) -> list[str]:
    """Names of the levels from the coarsest down to `cut`; without it the coarser half of the latents.

    cut: a name, or `NAME:COUNT` for the first COUNT of what each call of a loop is given. Raises `DataError`.
    """
    names, latents = list(session.levels), len(session.latent_shapes)
    if cut is None:
        return names[: max(1, latents // 2)]
    name = _calls(session, cut)[0]
    return [*names[: names.index(name)], cut]


def _calls(session: Session, level: str) -> tuple[str, int | None]:
    """The name in `NAME:COUNT`, and the count; None for the whole. Raises `DataError`."""
    name, colon, count = level.partition(":")
    if name not in session.levels:
        raise DataError(f"unknown latent '{name}'; choose among {', '.join(session.levels)}")
    steps = getattr(session.drawing.beside().get(name), "steps", None)
    if colon and steps is None:
        raise DataError(f"'{level}' names some calls of a loop, and '{name}' is not of every call; give its name alone")
    if colon and not (count.isdigit() and 1 <= int(count) <= (steps or 0)):
        raise DataError(f"'{level}' must name 1 .. {steps} calls of '{name}'")
    return name, int(count) if colon else None


def style_row(session: Session, row: Latents, columns: Latents, names: Iterable[str]) -> Array:
    """Images `[B, C, R, R]` of what is `styled`."""
    return _images(session, styled(session, row, columns, names))


def styled(session: Session, row: Latents, columns: Latents, names: Iterable[str]) -> dict[str, Array]:
    """`columns` (a batch of B) with the latents `names` taken from `row` (a batch of 1).

    Conditions, such as a class, go with the coarsest latent. names: as of `coarse_down_to`. Raises `DataError` for an
    unknown one.
    """
    taken = [_calls(session, name) for name in names]
    whole, given = [name for name, calls in taken if calls is None], repeat(row, count(columns))
    conditions = session.conditions if next(iter(session.latent_shapes)) in whole else ()
    mixed = mix(columns, given, [*whole, *conditions])
    for name, calls in taken:
        if calls is not None:
            mixed[name] = np.concatenate([given[name][:, :calls], mixed[name][:, calls:]], 1)
    return mixed


def space_to_image(session: Session) -> str:
    """The first space beside the latents' own that leads from them to images. Raises `DataError` where none does."""
    found = next((name for name, space in session.manifest.spaces.items() if space.into and space.decode), None)
    if found is None:
        raise DataError(
            f"this {session.manifest.family} model has no space between latents and image; omit --centre-of"
        )
    return found


def centre(
    session: Session, space: str, number: int, std: Stds | None = None, seed: int = 0, option: str | None = None
) -> dict[str, NDArray[np.float64]]:
    """Mean values of `number` images of `seed`, none of which anybody else draws, `[*shape]` by name."""
    check_count("the number of images in the centre", number)
    sums: dict[str, NDArray[np.float64]] = {}
    for drawn in session.draw(range(_OTHERS, _OTHERS + number), std, seed, BATCH, option):
        for name, values in session.into_space(space, drawn).items():
            sums[name] = sums.get(name, 0) + values.astype(np.float64).sum(0)
    return {name: total / number for name, total in sums.items()}


def pulled(centre: Mapping[str, NDArray[np.float64]], values: Latents, share: float) -> dict[str, Array]:
    """Values at this share of their way from the centre: 1 leaves them, 0 is the centre."""
    return {name: (centre[name] + share * (found - centre[name])).astype(np.float32) for name, found in values.items()}


def space_of_slots(session: Session) -> str | None:
    """The first space whose values are one row a layer, that leads from latents to images; None for most models."""
    spaces = session.manifest.spaces.items()
    return next((name for name, found in spaces if found.slots and found.into and found.decode), None)


def parse_slots(session: Session, space: str, texts: Sequence[str]) -> list[int]:
    """Slots named as seeds are, see `parse_seeds`; by default the coarser half. Raises `DataError`."""
    count = next(iter(session.space_shapes(space).values()))[0]
    chosen = parse_seeds(texts) if texts else list(range(count // 2))
    if max(chosen) >= count:
        raise DataError(f"this model has the slots 0-{count - 1}; found {max(chosen)}")
    return chosen


def slots_row(session: Session, space: str, row: Latents, columns: Latents, slots: Sequence[int]) -> Array:
    """As `style_row`, of values of a space of slots."""
    mixed = slots_mixed(session, space, row, columns, slots)
    return np.concatenate([session.decode(space, part) for part in batches(mixed)])


def slots_mixed(session: Session, space: str, row: Latents, columns: Latents, slots: Sequence[int]) -> dict[str, Array]:
    """Values of a space of slots: those of `columns` with some slots of `row`. Raises `DataError`."""
    mixed = dict(columns)
    name = next(iter(session.space_shapes(space)))
    mixed[name] = columns[name].copy()
    if not all(0 <= slot < mixed[name].shape[1] for slot in slots):
        raise DataError(f"this model has the slots 0-{mixed[name].shape[1] - 1}; found {max(slots)}")
    mixed[name][:, slots] = row[name][:, slots]
    return mixed


def _images(session: Session, latents: Latents) -> Array:
    return np.concatenate([session.forward(part) for part in batches(latents)])
