"""Images through latents and back in calls of a fixed number, marked exact or not, and the file that says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hflow_rt.errors import DataError
from hflow_rt.runtime import load
from hflow_rt.runtime.images.pictures import from_uint8
from hflow_rt.runtime.latents import round_trips
from hflow_rt.runtime.latents.files import how_made, load_latents, save_latents
from hflow_rt.runtime.latents.round_trips import RoundTrip, decoded, encoded, round_trip, together
from hflow_rt.runtime.session import Session


@pytest.fixture(scope="module")
def session(many_steps: Path) -> Session:
    return load(many_steps, device="cpu")


def pictures(count: int) -> Any:
    """Uniform noise, far from anything."""
    return from_uint8(np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8))


@pytest.fixture
def calls(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call has that the session makes."""
    seen: list[int] = []
    real = session.run

    def run(route: Any, values: Any, *only: Any) -> Any:
        seen.append(len(next(iter(values.values()))))
        return real(route, values, *only)

    monkeypatch.setattr(session, "run", run)
    return seen


def test_calls_are_filled_up(session: Session, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_trips, "BATCH", 2)
    images = pictures(5)
    found = encoded(session, images, {}).latents
    assert {len(values) for values in found.values()} == {5}
    assert np.ptp(found["start"], axis=0).min() > 0
    back = np.concatenate(list(decoded(session, found, batch=2)))
    assert calls == [2] * 6
    np.testing.assert_allclose(back, images, atol=1e-5)
    # what an image becomes depends on nothing that is decoded beside it
    for rows in ([4], [3, 0, 4], [1, 4, 2, 4]):
        some = np.concatenate(list(decoded(session, {name: v[rows] for name, v in found.items()}, batch=2)))
        np.testing.assert_array_equal(some, back[rows])
    monkeypatch.setattr(round_trips, "BATCH", 16)
    assert [together(session, count) for count in (1, 16, 17, 40)] == [1, 16, 9, 14]
    monkeypatch.setattr(round_trips, "_BYTES", 4 * 3 * sum(np.prod(shape) for shape in session.input_shapes.values()))
    assert together(session, 7) == 3


def test_models_of_one_call_are_not_filled_up(tiny_run: Path) -> None:
    session = load(tiny_run, device="cpu")
    images = np.random.default_rng(0).uniform(size=(3, 3, 16, 16)).astype(np.float32)
    found = encoded(session, images, {})
    expected = session.inverse(images)
    np.testing.assert_array_equal(found.log_prob, expected.log_prob)
    assert [len(part) for part in decoded(session, found.latents, batch=2)] == [2, 1]


def test_each_image_is_exact_or_not(session: Session) -> None:
    images = pictures(3)
    latents = encoded(session, images, {}, {"delta": 0.3}).latents
    found = round_trip(session, images, latents, {"delta": 0.3})
    assert found == RoundTrip(backend=session.backend, batch=3, largest_difference=(0, 0, 0))
    assert found.exact == 3
    assert found.words() == f"3 of 3 images come back in every 8-bit value on {session.backend}"
    assert round_trip(session, images, latents).exact == 0  # with another delta
    latents["residual"][1, 0, 0, 0] += 0.2 if images[1, 0, 0, 0] < 0.5 else -0.2
    found = round_trip(session, images, latents, {"delta": 0.3})
    assert found.largest_difference == (0, 51, 0)
    assert found.words("abc").startswith("2 of 3 images come back")
    assert found.words("abc").endswith("; b differs by up to 51 of 255")


def test_noise_is_rounded_on_the_way_and_kept_in_half_the_bytes(session: Session, tmp_path: Path) -> None:
    images = pictures(2)
    latents = encoded(session, images, {}).latents
    assert not (latents["noise"] * 16 % 1).any()
    assert len(np.unique(latents["noise"])) > 50
    assert (latents["residual"] * 16 % 1).any()
    path = tmp_path / "latents.safetensors"
    save_latents(path, latents, {"steps": 4})
    kinds = {name: values.dtype.name for name, values in load_file(path).items()}
    assert kinds == {"noise": "float16", "start": "float32", "start_noise": "float32", "residual": "float32"}
    again, _ = load_latents(path)
    for name, values in latents.items():
        assert again[name].dtype == np.float32
        np.testing.assert_array_equal(again[name], values)
    large = {"a": np.array([[1e6, 0.5]], np.float32), "b": np.array([[2048.5]], np.float32)}
    save_latents(path, large, {})
    again, _ = load_latents(path)
    assert {name: values.tolist() for name, values in again.items()} == {"a": [[1e6, 0.5]], "b": [[2048.5]]}


@pytest.mark.parametrize(
    ("metadata", "where"),
    [
        ({"controls": {"delta": "much"}}, "controls.delta"),
        ({"controls": [1]}, "controls"),
        ({"steps": 2.5}, "steps"),
        ({"round_trip": {"backend": "x", "batch": 10**9, "largest_difference": []}}, "round_trip.batch"),
    ],
)
def test_what_a_file_says_that_cannot_be(metadata: dict[str, Any], where: str) -> None:
    with pytest.raises(DataError, match=rf"a\.safetensors says {where} that cannot be .*; encode it again"):
        how_made(metadata, "a.safetensors")


def test_memory_is_asked_for_first(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    needed: Callable[..., None] = lambda size, *_: asked.append(size)  # noqa: E731
    monkeypatch.setattr(round_trips, "need", needed)
    encoded(session, pictures(3), {})
    each = sum(np.prod(shape) for shape in session.input_shapes.values())
    assert asked == [8 * 3 * each]
