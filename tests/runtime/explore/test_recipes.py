"""What recipes of the page mean, against the same done by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from hflow_rt.errors import DataError
from hflow_rt.runtime import load
from hflow_rt.runtime.explore.recipes import Kept, Recipe, Shelf, cook, images
from hflow_rt.runtime.latents import latent_views as views
from hflow_rt.runtime.latents.attributes import measure_attribute
from hflow_rt.runtime.latents.nearest import find_tensor
from hflow_rt.runtime.latents.operations import slerp
from hflow_rt.runtime.session import Session


def made(session: Session, recipe: dict[str, Any], shelf: Shelf | None = None) -> Any:
    return np.concatenate([*images(session, shelf or Shelf(), [Recipe.model_validate(recipe)])])


def drawn(session: Session, image: int, seed: int = 3, **how: Any) -> dict[str, Any]:
    return dict(next(session.draw([image], seed=seed, **how)))


def test_samples_are_those_of_the_seed(session: Session) -> None:
    recipes = [Recipe(seed=3, image=image, std={"z0": 0.3}) for image in (4, 0)]
    found = np.concatenate([*images(session, Shelf(), recipes)])
    expected = session.sample(5, seed=3, std={"z0": 0.3})
    np.testing.assert_allclose(found, expected[[4, 0]], atol=1e-5)


def test_redrawn_and_zeroed(session: Session) -> None:
    expected = drawn(session, 2)
    expected["z1"] = drawn(session, 9)["z1"]
    expected["end1"] = np.zeros_like(expected["end1"])
    found = made(session, {"seed": 3, "image": 2, "redrawn": {"z1": 9}, "zeroed": ["end1"]})
    np.testing.assert_array_equal(found, session.forward(expected))


def test_mixed(session: Session) -> None:
    base, other = drawn(session, 0), drawn(session, 1)
    found = made(session, {"seed": 3, "mixed": {"other": {"seed": 3, "image": 1}, "levels": ["end0", "end1"]}})
    np.testing.assert_array_equal(found, views.style_row(session, other, base, ["end0", "end1"]))


@pytest.mark.parametrize("space", ["z", "y0"])
def test_between(session: Session, space: str) -> None:
    ends = [session.into_space(space, drawn(session, image)) for image in (0, 1)]
    there = slerp(*ends, 0.25, session.joined(space))
    way = {"other": {"seed": 3, "image": 1}, "share": 0.25, "mode": "slerp", "space": space}
    np.testing.assert_array_equal(made(session, {"seed": 3, "between": way}), session.decode(space, there))


def test_moved_along_an_attribute(session: Session) -> None:
    where, shelf = find_tensor(session), Shelf()
    points = [
        np.concatenate([session.into_space(where.space, drawn(session, image))[where.name] for image in part])
        for part in (range(3), range(3, 6))
    ]
    found = measure_attribute(session, where, *[one.reshape(3, -1) for one in points])
    shelf.keep_attribute("smile", found)
    values = session.into_space(where.space, drawn(session, 0))
    values[where.name] = values[where.name] + np.float32(0.5) * found.vector
    moved = made(session, {"seed": 3, "moved": {"attribute": "smile", "gain": 0.5}}, shelf)
    np.testing.assert_array_equal(moved, session.decode(where.space, values))


def test_a_kept_picture_takes_part(session: Session) -> None:
    shelf = Shelf()
    shelf.keep("mine", Kept("z", drawn(session, 7, seed=8)))
    np.testing.assert_array_equal(
        made(session, {"picture": "mine"}, shelf), made(session, {"seed": 8, "image": 7}, shelf)
    )
    changed = drawn(session, 7, seed=8)
    changed["z1"] = drawn(session, 5, seed=2)["z1"]
    found = made(session, {"picture": "mine", "seed": 2, "redrawn": {"z1": 5}}, shelf)
    np.testing.assert_array_equal(found, session.forward(changed))


def test_layers_of_a_space(slotted: Session) -> None:
    space = views.space_of_slots(slotted)
    assert space is not None
    base, other = (slotted.into_space(space, drawn(slotted, image)) for image in (0, 1))
    expected = slotted.decode(space, views.slots_mixed(slotted, space, other, base, [0, 1]))
    found = made(slotted, {"seed": 3, "mixed": {"other": {"seed": 3, "image": 1}, "slots": [0, 1]}})
    np.testing.assert_array_equal(found, expected)
    shelf = Shelf()
    shelf.keep("searched", Kept(space, base))
    way = {"other": {"seed": 3, "image": 1}, "share": 1.0}  # in the space of the one that was searched for
    np.testing.assert_allclose(
        made(slotted, {"picture": "searched", "between": way}, shelf), slotted.decode(space, other), atol=1e-6
    )
    with pytest.raises(DataError, match="known in space w only"):
        made(slotted, {"picture": "searched", "zeroed": ["z"]}, shelf)
    with pytest.raises(DataError, match="no latents to mix; mix its layers"):
        made(slotted, {"picture": "searched", "mixed": {"other": {"image": 1}, "levels": ["z"]}}, shelf)


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ({"zeroed": ["z7"]}, "unknown latent 'z7'; choose among end0, end1, z1, z0"),
        ({"redrawn": {"w": 1}}, "unknown latent 'w'"),
        ({"picture": "gone"}, "this picture is no longer kept here"),
        ({"moved": {"attribute": "gone", "gain": 1}}, "this attribute is no longer kept here"),
        ({"std": {"z9": 1}}, "unknown latent 'z9' in std"),
        ({"label": "cat"}, "this model knows no classes"),
        ({"mixed": {"other": {}, "levels": ["z7"]}}, "unknown latent 'z7'"),
        ({"mixed": {"other": {}, "slots": [0]}}, "no layers of this model have values of their own"),
        ({"between": {"other": {}, "share": 0.5, "mode": "leap"}}, "mode must be one of lerp, slerp"),
        ({"between": {"other": {}, "share": 0.5, "space": "q"}}, "unknown space 'q'"),
    ],
)
def test_what_the_model_lacks_is_a_sentence(session: Session, recipe: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError, match=line):
        cook(session, Shelf(), Recipe.model_validate(recipe))


@pytest.mark.parametrize(
    "recipe",
    [
        {"seed": -1},
        {"image": 2**53},
        {"image": 0.5},
        {"between": {"other": {}, "share": 1.5}},
        {"moved": {"attribute": "a", "gain": 1e9}},
        {"file": "/etc/passwd"},
        {"mixed": {"other": {"mixed": {"other": {}}}}},
    ],
)
def test_what_is_no_recipe(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(recipe)


def test_older_pictures_make_room(session: Session) -> None:
    shelf = Shelf()
    for number in range(600):
        shelf.keep(str(number), Kept("z", {}))
        if number > 5:
            shelf.picture("5")  # in use
    assert shelf.picture("599").space == shelf.picture("5").space == "z"
    with pytest.raises(DataError, match="no longer kept"):
        shelf.picture("6")


def test_steps_and_controls_of_the_model_hold(many_steps: Path) -> None:
    session = load(many_steps, device="cpu").in_steps(2).with_controls({"delta": 0.1})
    expected = session.forward(drawn(session, 1))
    np.testing.assert_array_equal(made(session, {"seed": 3, "image": 1}), expected)
    zeroed = drawn(session, 1)
    zeroed["start"] = views.zeroed(session, "start", zeroed["start"])
    assert abs(zeroed["start"]).max() > 0  # the mean of the bank
    np.testing.assert_array_equal(made(session, {"seed": 3, "image": 1, "zeroed": ["start"]}), session.forward(zeroed))
