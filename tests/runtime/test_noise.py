"""Noise belongs to an image, not to a batch; stds are parsed strictly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hflow_rt.errors import DataError
from hflow_rt.runtime.noise import draw, draw_latents, parse_std

SHAPES = {"end": (5,), "z1": (4, 2, 2), "z0": (3, 4, 4)}
NAMES = list(SHAPES)
SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, indices=st.lists(SEEDS, min_size=1, max_size=5))
def test_an_image_is_the_same_in_any_batch(seed, indices):
    batch = draw(SHAPES, seed, indices)
    for row, index in enumerate(indices):
        alone = draw(SHAPES, seed, [index])
        for name, shape in SHAPES.items():
            assert batch[name].shape == (len(indices), *shape)
            assert batch[name].dtype == np.float32
            np.testing.assert_array_equal(batch[name][row], alone[name][0])


def test_seeds_images_and_levels_differ():
    one, other = draw(SHAPES, 1, [0, 1]), draw(SHAPES, 2, [0, 1])
    vectors = [drawn[name][row].ravel()[:5] for drawn in (one, other) for name in NAMES for row in (0, 1)]
    assert len({tuple(vector.tolist()) for vector in vectors}) == len(vectors)


def test_the_stream_never_changes():
    """A promise: with other numbers, every seed that anybody noted down means another image."""
    drawn = draw({"a": (3,), "b": (1, 2)}, 7, [2**63])
    np.testing.assert_allclose(drawn["a"][0], PROMISED[:3], rtol=1e-6)
    np.testing.assert_allclose(drawn["b"][0, 0], PROMISED[3:], rtol=1e-6)


PROMISED = [
    0.40089747309684753,
    -1.1064907312393188,
    1.1299852132797241,
    -0.7756965756416321,
    -0.9863882064819336,
]


def test_coarse_levels_do_not_depend_on_finer_ones():
    fewer = draw({"end": (5,), "z1": (4, 2, 2)}, 3, [8])
    np.testing.assert_array_equal(fewer["z1"], draw(SHAPES, 3, [8])["z1"])


def test_noise_is_standard_normal():
    values = draw({"z": (2000,)}, 0, range(50))["z"].astype(np.float64)  # 1e5 values: 5 sigma bounds
    assert abs(values.mean()) < 5 / math.sqrt(1e5)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / 1e5)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / 1e5)
    across = np.corrcoef(values)
    assert np.abs(across - np.eye(50)).max() < 6 / math.sqrt(2000)


def test_latents_are_noise_times_both_stds():
    prior, std = {"end": 1.0, "z1": 0.5, "z0": 2.0}, {"end": 1.0, "z1": 0.25, "z0": 0.7}
    noise, latents = draw(SHAPES, 5, [3, 1]), draw_latents(SHAPES, prior, 5, [3, 1], std)
    assert list(latents) == NAMES
    for name in NAMES:
        assert latents[name].dtype == np.float32
        np.testing.assert_allclose(latents[name], noise[name] * prior[name] * std[name], rtol=1e-6)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_keys_out_of_range_are_refused(seed, index):
    with pytest.raises(DataError, match=r"must be in 0 \.\. 2\^64 - 1; found"):
        draw(SHAPES, seed, [index])


def test_an_empty_batch_is_refused():
    with pytest.raises(DataError, match="at least one image must be drawn"):
        draw(SHAPES, 0, [])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (0.7, [0.7, 0.7, 0.7]),
        ("0.7", [0.7, 0.7, 0.7]),
        (["0.7"], [0.7, 0.7, 0.7]),
        ([], [1, 1, 1]),
        (["z1=0.5"], [1, 0.5, 1]),
        (["0.7", "z1=0.5"], [0.7, 0.5, 0.7]),
        (["z1=0.5", "0.7"], [0.7, 0.7, 0.7]),
        (["z1=0.5", "z1=2"], [1, 2, 1]),
        ({"end": 0.3}, [0.3, 1, 1]),
        (np.float32(0.5), [0.5, 0.5, 0.5]),
    ],
)
def test_std_forms(values, expected):
    assert parse_std(values, NAMES) == dict(zip(NAMES, expected, strict=True))


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "-inf", "", "big", "1=2"])
@pytest.mark.parametrize("form", ["{}", "z1={}"])
def test_std_must_be_positive_and_finite(number, form):
    text = form.format(number)
    with pytest.raises(DataError) as caught:
        parse_std(["0.5", text], NAMES)
    message = str(caught.value)
    assert "end, z1, z0" in message
    assert "\n" not in message
    if "=" not in number or form != "{}":  # '1=2' alone is the std 2 of a latent called 1
        assert message.startswith(f"std must be a finite number > 0; found '{text}'")


@pytest.mark.parametrize("number", [0, -0.5, math.nan, math.inf])
def test_std_numbers_are_held_to_the_same(number):
    for values in (number, {"z0": number}):
        with pytest.raises(DataError, match="std must be a finite number > 0"):
            parse_std(values, NAMES)


@pytest.mark.parametrize("values", [["z9=0.5"], ["=1"], {"z9": 0.5}])
def test_std_of_an_unknown_latent(values):
    with pytest.raises(DataError, match=r"unknown latent '(z9|)' in std; the latents of this model are end, z1, z0"):
        parse_std(values, NAMES)
