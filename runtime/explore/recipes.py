"""What a picture on the page is made of, in words that a link can hold, and the latents that it means.

A recipe is a sample or a kept picture, with latents redrawn or zeroed; then mixed with another, moved towards another,
and moved along an attribute, in this order. The page in the browser follows the same rules (`web-page/recipes.js`).
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from hflow_rt.errors import DataError
from hflow_rt.runtime.latents.attributes import Attribute, move
from hflow_rt.runtime.latents.latent_views import batches, slots_mixed, styled, way_in, zeroed
from hflow_rt.runtime.latents.operations import Latents, concatenate
from hflow_rt.runtime.session import LATENT_SPACE, Array, Session

__all__ = ["Between", "Kept", "Mixed", "Moved", "Recipe", "Shelf", "Start", "cook", "images", "parts_of"]

Share = Annotated[float, Field(ge=0, le=1)]
Gain = Annotated[float, Field(ge=-100, le=100)]
Number = Annotated[int, Field(ge=0, lt=2**53)]  # what a browser counts exactly
Std = Annotated[float, Field(gt=0, le=100)]
_PICTURES, _ATTRIBUTES = 512, 64
T = TypeVar("T")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Start(_Part):
    """Image `image` of `seed` at `std`, or a kept picture; then latents of other images of the seed, or zero."""

    seed: Number = 0
    image: Number = 0
    picture: str | None = None
    label: str | None = None
    std: dict[str, Std] = {}
    redrawn: dict[str, Number] = {}
    zeroed: tuple[str, ...] = ()


class Mixed(_Part):
    """The latents `levels`, or the layers `slots`, are those of `other`."""

    other: Start
    levels: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()


class Between(_Part):
    """At `share` of the way to `other`."""

    other: Start
    share: Share
    mode: str = "lerp"
    space: str = LATENT_SPACE


class Moved(_Part):
    """`gain` times a kept attribute is added."""

    attribute: str
    gain: Gain


class Recipe(Start):
    """A picture."""

    mixed: Mixed | None = None
    between: Between | None = None
    moved: Moved | None = None


@dataclass(frozen=True)
class Kept:
    """Values of one picture, a batch of 1, and the space they are in."""

    space: str
    values: Latents


class Shelf:
    """What people have put on the page, the latest of each kind; older ones make room."""

    def __init__(self) -> None:
        self._pictures: OrderedDict[str, Kept] = OrderedDict()
        self._attributes: OrderedDict[str, Attribute] = OrderedDict()

    def keep(self, name: str, picture: Kept) -> None:
        """Keep a picture."""
        _put(self._pictures, name, picture, _PICTURES)

    def keep_attribute(self, name: str, attribute: Attribute) -> None:
        """Keep an attribute."""
        _put(self._attributes, name, attribute, _ATTRIBUTES)

    def picture(self, name: str) -> Kept:
        """A kept picture. Raises `DataError`."""
        return _take(self._pictures, name, "picture")

    def attribute(self, name: str) -> Attribute:
        """A kept attribute. Raises `DataError`."""
        return _take(self._attributes, name, "attribute")


def cook(session: Session, shelf: Shelf, recipe: Recipe) -> Kept:
    """The values of a recipe. Raises `DataError` for what this model or the shelf does not have."""
    made = _begun(session, shelf, recipe)
    if recipe.mixed is not None:
        made = _mixed(session, made, _begun(session, shelf, recipe.mixed.other), recipe.mixed)
    if recipe.between is not None:
        made = _between(session, made, _begun(session, shelf, recipe.between.other), recipe.between)
    if recipe.moved is not None:
        attribute = shelf.attribute(recipe.moved.attribute)
        values = move(session, made.values, attribute, recipe.moved.gain, made.space)
        made = Kept(attribute.about.space, values)
    return made


def images(session: Session, shelf: Shelf, recipes: Sequence[Recipe]) -> Iterator[Array]:
    """Images `[n, C, R, R]` of the recipes, in their order, those of one space together. Raises as `cook` does."""
    for space, values in parts_of(session, shelf, recipes):
        for part in batches(values):
            yield session.decode(space, part)


def parts_of(session: Session, shelf: Shelf, recipes: Sequence[Recipe]) -> Iterator[tuple[str, dict[str, Array]]]:
    """What `decode` takes for the recipes, in their order: neighbours of one space together."""
    made = [cook(session, shelf, recipe) for recipe in recipes]
    start = 0
    for stop in range(1, len(made) + 1):
        if stop == len(made) or made[stop].space != made[start].space:
            yield made[start].space, concatenate([one.values for one in made[start:stop]])
            start = stop


def _begun(session: Session, shelf: Shelf, start: Start) -> Kept:
    if start.picture is not None:
        made = shelf.picture(start.picture)
    else:
        made = Kept(LATENT_SPACE, _drawn(session, start, start.image))
    changed = {*start.redrawn, *start.zeroed}
    if not changed:
        return made
    if made.space != LATENT_SPACE:
        raise DataError(f"this picture is known in space {made.space} only, where it has no latents to change")
    if unknown := sorted(changed - {*session.levels}):
        raise DataError(f"unknown latent '{unknown[0]}'; choose among {', '.join(session.levels)}")
    values = dict(made.values)
    for name, image in start.redrawn.items():
        values[name] = _drawn(session, start, image)[name]
    for name in start.zeroed:
        values[name] = zeroed(session, name, values[name])
    return Kept(LATENT_SPACE, values)


def _drawn(session: Session, start: Start, image: int) -> dict[str, Array]:
    """Latents of an image of the seed."""
    return next(session.draw([image], start.std or None, start.seed, option=start.label))


def _mixed(session: Session, made: Kept, other: Kept, how: Mixed) -> Kept:
    if how.slots:
        space = next((name for name in session.manifest.spaces if session.manifest.spaces[name].slots), None)
        if space is None:
            raise DataError("no layers of this model have values of their own; mix latents")
        base, given = (_within(session, one, space) for one in (made, other))
        return Kept(space, slots_mixed(session, space, given, base, how.slots))
    if LATENT_SPACE not in (made.space, other.space) or made.space != other.space:
        raise DataError("a picture that was searched for has no latents to mix; mix its layers")
    return Kept(LATENT_SPACE, styled(session, other.values, made.values, how.levels))


def _between(session: Session, made: Kept, other: Kept, how: Between) -> Kept:
    space = next((one.space for one in (made, other) if one.space != LATENT_SPACE), how.space)
    first, last = (_within(session, one, space) for one in (made, other))
    return Kept(space, way_in(session, space, how.mode)(first, last, how.share))


def _within(session: Session, picture: Kept, space: str) -> dict[str, Array]:
    if picture.space == space:
        return dict(picture.values)
    if picture.space != LATENT_SPACE:
        raise DataError(f"this picture is known in space {picture.space} only, from which nothing leads to {space}")
    return session.into_space(space, picture.values)


def _put(among: OrderedDict[str, T], name: str, thing: T, most: int) -> None:
    among[name] = thing
    among.move_to_end(name)
    while len(among) > most:
        among.popitem(last=False)


def _take(among: OrderedDict[str, T], name: str, what: str) -> T:
    if name not in among:
        raise DataError(f"this {what} is no longer kept here; put it on the page again")
    among.move_to_end(name)
    return among[name]
