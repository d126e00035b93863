"""What can be done with latents: mix, redraw, walk between.

Latents are a dict from name to float32 array `[B, *shape]`, coarse to fine. Everything here is numpy and
knows no backend; `lerp` and `mix` use nothing but arithmetic and so take torch tensors as well.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import DataError
from hflow_rt.runtime.noise import Stream, draw_latents

__all__ = [
    "MODES",
    "Latents",
    "Way",
    "check_latents",
    "concatenate",
    "interpolate",
    "lerp",
    "mix",
    "path_by",
    "ping_pong",
    "random_walk",
    "resample",
    "slerp",
]

Latents = Mapping[str, NDArray[np.float32]]
Way = Callable[[Latents, Latents, float], dict[str, NDArray[np.float32]]]

MODES = ("lerp", "slerp")

_SAME = 1e-3  # mean absolute difference below which slerp takes two items for one
_PARALLEL = 1e-6  # sine of the angle below which the arc is a straight line, or (opposite items) undefined


def lerp(a: Latents, b: Latents, t: float) -> dict[str, NDArray[np.float32]]:
    """The straight line from `a` (t = 0) to `b` (t = 1): `(1 - t) a + t b`.

    Raises `DataError` if their names or shapes differ.
    """
    _check_pair(a, b)
    return {name: (1 - t) * a[name] + t * b[name] for name in a}


def slerp(
    a: Latents, b: Latents, t: float, joined: Iterable[Sequence[str]] = (), straight: Collection[str] = ()
) -> dict[str, NDArray[np.float32]]:
    """The arc from `a` (t = 0) to `b` (t = 1), for each latent of each sample as one long vector.

    `joined` names groups of latents that turn together, as one vector; those that `straight` names, such as classes,
    take the straight line. So do items that are parallel, opposite or zero; items that differ by less than 1e-3 in
    the mean stay `a`.
    Raises `DataError` if names or shapes differ or a group names a latent that is not there or taken.
    """
    _check_pair(a, b)
    lines = [name for name in a if name in straight]
    mixed = lerp({name: a[name] for name in lines}, {name: b[name] for name in lines}, t)
    for group in _groups([name for name in a if name not in mixed], joined):
        arc = _arc(_flatten(a, group), _flatten(b, group), t)
        ends = np.cumsum([a[name][0].size for name in group])
        for name, part in zip(group, np.split(arc, ends[:-1], axis=1), strict=True):
            mixed[name] = part.reshape(a[name].shape).astype(np.float32)
    return {name: mixed[name] for name in a}


def interpolate(
    a: Latents,
    b: Latents,
    frames: int,
    mode: str = "lerp",
    joined: Iterable[Sequence[str]] = (),
    straight: Collection[str] = (),
    turned: Collection[str] = (),
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """`frames` latents from `a` to `b`, both included, at equal steps; each like `a`, made one at a time.

    joined, straight: see `slerp`. turned: what goes by cosine and sine in any mode, as noise does whose variance is to
    stay.
    Raises `DataError` before the first for fewer than two frames, an unknown mode, or latents that do not match.
    """
    if frames < 2:
        raise DataError(f"an interpolation needs at least 2 frames; found {frames}; ask for more")
    path = path_by(mode, joined, straight, turned)
    path(a, b, 0.0)  # do they fit?
    return (path(a, b, index / (frames - 1)) for index in range(frames))


def ping_pong(n: int) -> list[int]:
    """Frame numbers there and back, 0 .. n-1, n-2 .. 1: a seamless loop that shows neither end twice."""
    if n < 1:
        raise DataError(f"an animation needs at least 1 frame; found {n}")
    return [*range(n), *range(n - 2, 0, -1)]


def mix(base: Latents, other: Latents, names: Iterable[str]) -> dict[str, NDArray[np.float32]]:
    """Style mixing: `base` with the latents `names` taken from `other`.

    Raises `DataError` for an unknown name, or if names or shapes of the two differ.
    """
    _check_pair(base, other)
    chosen = _known(names, base)
    return {name: (other if name in chosen else base)[name] for name in base}


def resample(
    latents: Latents,
    names: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    prior_std: Mapping[str, float],
    std: Mapping[str, float],
    seed: int,
) -> dict[str, NDArray[np.float32]]:
    """`latents` with the levels `names` replaced by those that `seed` draws for images 0 .. B-1.

    Raises `DataError` if a name is unknown or the latents do not fit `shapes`.
    """
    check_latents(latents, shapes, "latents to resample")
    count = len(next(iter(latents.values())))
    return mix(latents, draw_latents(shapes, prior_std, seed, range(count), std), names)


def random_walk(
    keys: Sequence[Latents],
    frames_per_segment: int,
    closed: bool = True,
    mode: str = "slerp",  # keeps the norm, hence the std, all along; lerp dips to 0.7 of it between keyframes
    joined: Iterable[Sequence[str]] = (),
    fixed: Iterable[str] = (),
    straight: Collection[str] = (),
    turned: Collection[str] = (),
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """A path through the keyframes `keys`, each passed exactly and shown once, one frame like `keys[0]` at a time.

    Closed, the path returns to the first keyframe: len(keys) * frames_per_segment frames that loop. Open, it
    ends on the last: (len(keys) - 1) * frames_per_segment + 1. Latents named in `fixed` stay as in the first
    keyframe; `joined`, `straight`: see `slerp`; `turned`: see `interpolate`.
    Raises `DataError` for counts too small, an unknown mode or name, keyframes that do not match, or if every
    latent is fixed.
    """
    if len(keys) < 2 or frames_per_segment < 1:
        raise DataError(
            "a walk needs at least 2 keyframes and 1 frame per segment; "
            f"found {len(keys)} and {frames_per_segment}; ask for more"
        )
    for key in keys[1:]:
        _check_pair(keys[0], key)
    still = _known(fixed, keys[0])
    if still == set(keys[0]):
        raise DataError("a walk must move at least one latent; found all of them fixed; leave one free")
    groups = [[name for name in group if name not in still] for group in joined]
    path = path_by(mode, [group for group in groups if group], straight, turned)
    moving = [{name: values for name, values in key.items() if name not in still} for key in keys]
    return _frames(keys[0], moving, frames_per_segment, closed, path)


def _frames(
    first: Latents, moving: Sequence[Latents], frames_per_segment: int, closed: bool, path: Way
) -> Iterator[dict[str, NDArray[np.float32]]]:
    for start, stop in pairwise([*moving, moving[0]] if closed else moving):
        for step in range(frames_per_segment):
            yield dict(first) | path(start, stop, step / frames_per_segment)
    if not closed:
        yield dict(first) | dict(moving[-1])


def concatenate(parts: Sequence[Latents]) -> dict[str, NDArray[np.float32]]:
    """One batch out of several, in order. Raises `DataError` for none, or if their names differ."""
    if not parts:
        raise DataError("at least one set of latents must be joined; found none")
    for part in parts[1:]:
        _check_pair({name: part[name][:1] for name in part}, {name: parts[0][name][:1] for name in parts[0]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_latents(latents: Latents, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise one `DataError` unless `latents` are finite float32 arrays or tensors `[B, *shape]` of equal B >= 1.

    `what` says where they are from, e.g. a file's path.
    """
    problems = [f"missing {name} {list(shape)}" for name, shape in shapes.items() if name not in latents]
    problems += [f"unexpected {name} {list(latents[name].shape[1:])}" for name in latents if name not in shapes]
    known: dict[str, Any] = {name: latents[name] for name in shapes if name in latents}
    for name, values in known.items():
        if values.ndim == 0 or values.shape[1:] != tuple(shapes[name]):
            problems.append(f"{name} is {list(values.shape[1:])} there and {list(shapes[name])} in the model")
        elif str(values.dtype) not in ("float32", "torch.float32"):
            problems.append(f"{name} is {values.dtype}, not float32")
        elif not isinstance(values, Stream) and not (abs(values) < math.inf).all():
            problems.append(f"{name} holds NaN or infinite values")
    sizes = sorted({values.shape[0] for values in known.values() if values.ndim})
    if len(sizes) > 1:
        problems.append(f"batch sizes {', '.join(map(str, sizes))} where all must be equal")
    elif sizes == [0]:
        problems.append("an empty batch")
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise DataError(f"{what}: latents do not fit the model: {shown}; use latents of this model")


def path_by(
    mode: str,
    joined: Iterable[Sequence[str]] = (),
    straight: Collection[str] = (),
    turned: Collection[str] = (),
) -> Way:
    """The way from `a` to `b` as a function of both and of the share t of it that is gone; see `interpolate`.

    Raises `DataError` for an unknown mode, and the function for latents that do not match.
    """
    if mode not in MODES:
        raise DataError(f"interpolation mode must be one of {', '.join(MODES)}; found '{mode}'")
    groups = list(joined)
    plain: Way = lerp if mode == "lerp" else lambda a, b, t: slerp(a, b, t, groups, straight)

    def path(a: Latents, b: Latents, t: float) -> dict[str, NDArray[np.float32]]:
        _check_pair(a, b)
        first, last = ({name: end[name] for name in end if name not in turned} for end in (a, b))
        others = plain(first, last, t)
        return {name: others[name] if name in others else _turn(a[name], b[name], t) for name in a}

    return path


def _turn(a: NDArray[np.float32], b: NDArray[np.float32], t: float) -> NDArray[np.float32]:
    """By cosine and sine from `a` to `b`, `[B, ...]`; items that are the same stay."""
    same = (a == b).reshape(len(a), -1).all(1).reshape(-1, *[1] * (a.ndim - 1))
    angle = t * (math.pi / 2)
    return np.where(same, a, np.float32(math.cos(angle)) * a + np.float32(math.sin(angle)) * b)


def _arc(a: NDArray[np.float64], b: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """slerp of the rows of `a` and `b`, `[B, D]`."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.divide((a * b).sum(axis=1), lengths, out=np.ones_like(lengths), where=lengths > 0)
    angle = np.arccos(np.clip(cosine, -1, 1))[:, None]  # rounding takes the cosine of parallel rows past 1
    sine = np.sin(angle)
    straight = sine < _PARALLEL
    divisor = np.where(straight, 1, sine)
    from_a = np.where(straight, 1 - t, np.sin((1 - t) * angle) / divisor)
    from_b = np.where(straight, t, np.sin(t * angle) / divisor)
    same = np.abs(a - b).mean(axis=1, keepdims=True) < _SAME
    return np.where(same, a, from_a * a + from_b * b)


def _flatten(latents: Latents, group: Sequence[str]) -> NDArray[np.float64]:
    rows = [latents[name].reshape(len(latents[name]), -1).astype(np.float64) for name in group]
    return np.concatenate(rows, axis=1)


def _groups(names: Sequence[str], joined: Iterable[Sequence[str]]) -> Iterator[Sequence[str]]:
    """`joined` as given, then every other name alone."""
    rest = list(names)
    for group in joined:
        _known(group, rest)  # a name in two groups is gone from the rest by then
        rest = [name for name in rest if name not in group]
        yield group
    for name in rest:
        yield (name,)


def _known(names: Iterable[str], latents: Iterable[str]) -> set[str]:
    chosen, known = list(names), list(latents)
    for name in chosen:
        if name not in known:
            raise DataError(f"unknown latent '{name}'; choose among {', '.join(known)}")
    return set(chosen)


def _check_pair(a: Latents, b: Latents) -> None:
    for name in [*a, *(name for name in b if name not in a)]:
        left, right = (str(list(side[name].shape)) if name in side else "missing" for side in (a, b))
        if left != right:
            raise DataError(f"latents must agree in shape; '{name}' is {left} and {right}; take both from one model")
