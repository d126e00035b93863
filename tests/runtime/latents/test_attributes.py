"""Attributes: found where they are, added where they belong, and refused by other models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hflow_rt.errors import DataError
from hflow_rt.runtime import BACKENDS, Session, load
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents.attributes import (
    Attribute,
    load_attribute,
    measure_attribute,
    move,
    parse_gains,
    save_attribute,
)
from hflow_rt.runtime.latents.nearest import TensorAddress

ON_CPU = sorted(BACKENDS.keys() - {"trt"})  # TensorRT needs a GPU

U1 = TensorAddress("y0", "u1")
Z1 = TensorAddress("z", "z1")  # 256 numbers
CLOSE = 2e-5


@pytest.fixture(scope="module")
def sessions(tiny_run: Path) -> dict[str, Session]:
    return {backend: load(tiny_run, backend, "cpu") for backend in ON_CPU}


@pytest.fixture
def session(sessions: dict[str, Session]) -> Session:
    return sessions["onnx"]


def points(count: int, seed: int, shift: float = 0.0, width: int = 6) -> Any:
    """Normal points, moved by `shift` along the first axis."""
    values = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    values[:, 0] += np.float32(shift)
    return values


def attribute(session: Session, place: TensorAddress = U1, shift: float = 3.0) -> Attribute:
    width = int(np.prod(session.space_shapes(place.space)[place.name]))
    return measure_attribute(session, place, points(40, 0, shift, width), points(40, 1, 0, width))


def test_a_shift_is_recovered(session: Session) -> None:
    found = measure_attribute(session, U1, points(4000, 0, 3.0), points(3000, 1), ("smiling", "neutral"))
    np.testing.assert_allclose(found.vector, [3, 0, 0, 0, 0, 0], atol=0.1)
    about = found.about
    assert (about.positive, about.negative, about.positives, about.negatives) == ("smiling", "neutral", 4000, 3000)
    assert about.address == U1
    assert about.norm == pytest.approx(3, abs=0.1)
    assert about.separation == pytest.approx(3, abs=0.1)  # stds are 1
    assert about.held_out_separation == pytest.approx(3, abs=0.1)
    back = measure_attribute(session, U1, points(3000, 1), points(4000, 0, 3.0))
    np.testing.assert_allclose(back.vector, -found.vector)
    assert back.about.separation == pytest.approx(about.separation)


def test_few_images_seem_apart_but_not_when_held_out(session: Session) -> None:
    about = measure_attribute(session, Z1, points(5, 0, width=256), points(5, 1, width=256)).about
    assert about.separation > 5
    assert about.held_out_separation < 1


@pytest.mark.parametrize(
    ("place", "sizes", "spreads"),
    [
        (Z1, (5, 5), (1, 1)),
        (Z1, (2, 2), (1, 1)),
        (Z1, (3, 12), (1, 1)),
        (Z1, (12, 3), (1, 3)),
        (U1, (2, 9), (1, 1)),
        (U1, (20, 20), (1, 1)),
    ],
)
def test_sets_without_a_difference_are_held_out_at_zero(
    session: Session, place: TensorAddress, sizes: tuple[int, int], spreads: tuple[float, float]
) -> None:
    """On average over many pairs of sets: neither below nor above, whatever the sizes, spreads and the mean."""
    width, found = (256 if place is Z1 else 6), []
    for seed in range(200):
        a = 7 + spreads[0] * points(sizes[0], 2 * seed, width=width)
        b = 7 + spreads[1] * points(sizes[1], 2 * seed + 1, width=width)
        found.append(measure_attribute(session, place, a, b).about.held_out_separation)
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error < 0.8
    assert 0.35 < np.mean(np.array(found) > 0) < 0.65


@pytest.mark.parametrize(("sizes", "shift"), [((20, 20), 6.0), ((10, 30), 3.0), ((60, 60), 0.5)])
def test_a_difference_is_found_held_out(session: Session, sizes: tuple[int, int], shift: float) -> None:
    """As far as the noise of the attribute lets it: shift^2 / |vector|, with stds of 1."""
    width, found = 256, []
    for seed in range(100):
        a, b = points(sizes[0], 2 * seed, shift, width), points(sizes[1], 2 * seed + 1, width=width)
        found.append(measure_attribute(session, Z1, a, b).about.held_out_separation)
    length = np.sqrt(shift**2 + width / (sizes[0] - 1) + width / (sizes[1] - 1))
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(shift**2 / length, rel=0.05, abs=3 * error)


def test_held_out_is_every_pair_left_out_in_turn(session: Session) -> None:
    a, b = points(300, 0, 1.0).astype(np.float64), points(7, 1).astype(np.float64)  # more rows than are taken at once
    past = []
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            line = np.delete(a, i, 0).mean(0) - np.delete(b, j, 0).mean(0)
            past.append((x - y) @ line / np.linalg.norm(line))
    line = a.mean(0) - b.mean(0)
    spread = np.sqrt((np.var(a @ line, ddof=1) + np.var(b @ line, ddof=1)) / 2) / np.linalg.norm(line)
    for swapped in (False, True):
        about = measure_attribute(session, U1, *((b, a) if swapped else (a, b))).about
        assert about.held_out_separation == pytest.approx(np.mean(past) / spread, rel=1e-9)
        assert about.separation == pytest.approx(np.linalg.norm(line) / spread, rel=1e-9)


def test_stds_are_those_of_samples(session: Session) -> None:
    """Sets at 10, 12 and 0, 2: 10 apart with an unbiased variance of 2."""
    positive, negative = np.zeros((2, 6), np.float32), np.zeros((2, 6), np.float32)
    positive[:, 0], negative[:, 0] = (10, 12), (0, 2)
    about = measure_attribute(session, U1, positive, negative).about
    assert about.separation == pytest.approx(10 / np.sqrt(2))
    assert about.held_out_separation == pytest.approx(10 / np.sqrt(2))


def test_an_image_in_both_sets_leaves_pairs_without_a_difference(session: Session) -> None:
    a, b = 1000 * points(2, 0), 1000 * points(2, 1)
    b[0] = a[0]  # without the others, a[0] - b[0] is the difference: none
    about = measure_attribute(session, U1, a, b).about
    assert abs(about.held_out_separation) < 10


def test_the_vector_has_the_shape_of_its_tensor(session: Session) -> None:
    assert attribute(session, Z1).vector.shape == (4, 8, 8)
    assert attribute(session, TensorAddress("z", "end1")).vector.shape == (6, 1, 1)
    assert attribute(session).vector.shape == (6,)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (points(1, 0), points(5, 1), "at least 2 images on each side; positive has 1"),
        (points(5, 0), points(0, 1), "negative has 0"),
        (points(5, 0), points(5, 0), "different means and different images"),
        (points(1, 0).repeat(3, 0), points(1, 1).repeat(3, 0), "different means and different images"),
    ],
)
def test_sets_without_a_difference(session: Session, positive: Any, negative: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure_attribute(session, U1, positive, negative)


def test_sets_that_differ_in_one_number_only(session: Session) -> None:
    """No spread along the vector: a finite number, which JSON has, and no warning."""
    positive, negative = np.eye(6, dtype=np.float32)[[1, 2]], np.eye(6, dtype=np.float32)[[1, 2]]
    positive[:, 0] = 4
    about = measure_attribute(session, U1, positive, negative).about
    assert np.isfinite([about.separation, about.held_out_separation]).all()
    assert about.separation >= 1e5


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("place", [U1, TensorAddress("z", "z1")])
def test_only_its_tensor_moves(sessions: dict[str, Session], backend: str, place: TensorAddress) -> None:
    session = sessions[backend]
    latents = session.inverse(to_uint8(session.sample(2, 0.7))).latents
    found = attribute(session, place)
    moved = move(session, latents, found, -1.5)
    for name, values in session.into_space(place.space, latents).items():
        expected = values - np.float32(1.5) * found.vector if name == place.name else values
        np.testing.assert_allclose(moved[name], expected, atol=1e-4, err_msg=name)


def test_no_gain_is_the_image_and_backends_agree(sessions: dict[str, Session]) -> None:
    images = to_uint8(sessions["onnx"].sample(3, 0.7))
    shown = {}
    for backend, session in sessions.items():
        latents, found = session.inverse(images).latents, attribute(session)
        space = found.about.space
        still = session.decode(space, move(session, latents, found, 0.0))
        np.testing.assert_array_equal(to_uint8(still), images)
        shown[backend] = session.decode(space, move(session, latents, found, 1.0))
        entered = session.into_space(space, latents)
        np.testing.assert_array_equal(shown[backend], session.decode(space, move(session, entered, found, 1.0, space)))
    assert np.abs(shown["onnx"] - shown["torch"]).max() < CLOSE
    assert np.abs(to_uint8(shown["onnx"]).astype(int) - images).max() > 5


def test_files(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    found = attribute(session, TensorAddress("z", "z1"))
    save_attribute(path, found)
    again = load_attribute(path)
    np.testing.assert_array_equal(again.vector, found.vector)
    assert again.about == found.about
    assert again.about.model == session.manifest.checkpoint["sha256"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def changed(found: Attribute, **about: Any) -> Attribute:
    return Attribute(found.vector, found.about.model_copy(update=about))


def test_other_models_are_refused(session: Session) -> None:
    found = attribute(session)
    latents = next(session.draw([0]))
    with pytest.raises(DataError, match=r"of another model \(weights 000000000000\.\.\., not [0-9a-f]{12}\.\.\.\)"):
        move(session, latents, changed(found, model="0" * 64), 1.0)
    with pytest.raises(DataError, match=r"of shape \(2,\) in u0, not \(6,\)"):
        move(session, latents, changed(found, name="u0"), 1.0)
    with pytest.raises(DataError, match="of shape None in w"):
        move(session, latents, changed(found, name="w"), 1.0)
    with pytest.raises(DataError, match="unknown space 'w'"):
        move(session, latents, changed(found, space="w"), 1.0)


def test_broken_and_foreign_files(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(DataError, match="no attribute at"):
        load_attribute(path)
    save_attribute(path, attribute(session))
    whole, tensors = path.read_bytes(), load_file(path)
    for content in (b"", whole[:20], whole[:-1], b"\xff" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a whole attribute"):
            load_attribute(path)
    about = json.loads(attribute(session).about.model_dump_json())
    for header, message in (
        (None, "holds no attribute"),
        ("{", "is not a whole attribute"),
        ("[]", "is not an attribute of this version"),
        (json.dumps(about | {"norm": None}), r"is not an attribute of this version \(norm\)"),
        (json.dumps(about | {"format": 2}), r"is not an attribute of this version \(format\)"),
    ):
        save_file(tensors, path, None if header is None else {"hflow_rt.direction": header})
        with pytest.raises(DataError, match=message) as caught:
            load_attribute(path)
        assert "\n" not in str(caught.value)
    for bad in ({"other": tensors["direction"]}, {"direction": np.full(6, np.nan, np.float32)}):
        save_file(bad, path, {"hflow_rt.direction": json.dumps(about)})
        with pytest.raises(DataError, match="is not a whole attribute"):
            load_attribute(path)


@pytest.mark.parametrize(
    ("texts", "gains"),
    [
        (["1.5"], [1.5]),
        (["-2:2:5"], [-2, -1, 0, 1, 2]),
        (["-1", "0", "+.5"], [-1, 0, 0.5]),
        (["0, 2:4:2"], [0, 2, 4]),
        (["2:-2:3"], [2, 0, -2]),
    ],
)
def test_gains_by_name(texts: list[str], gains: list[float]) -> None:
    assert parse_gains(texts) == gains


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "1:2",
        "1:2:1",
        "1:2:0",
        "1:2:-3",
        "nan",
        "inf",
        "1e400",
        "9" * 400,
        "1:2:" + "9" * 5000,
        "1:2:65",
        "1:2:9999999999",
    ],
)
def test_gains_that_make_no_sense(text: str) -> None:
    with pytest.raises(DataError, match=r"a gain is a number, or FROM:TO:COUNT|at most 64 gains") as caught:
        parse_gains([text])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="at least one gain"):
        parse_gains([])
