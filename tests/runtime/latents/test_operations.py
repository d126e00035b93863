"""Latent arithmetic: endpoints, norms, loops, files, and the original's own interpolation."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from hflow_rt.errors import DataError
from hflow_rt.runtime.latents.files import load_latents, save_latents
from hflow_rt.runtime.latents.operations import (
    MODES,
    check_latents,
    concatenate,
    interpolate,
    lerp,
    mix,
    ping_pong,
    random_walk,
    resample,
    slerp,
)
from hflow_rt.runtime.noise import draw, draw_latents

SHAPES = {"end": (6,), "z1": (4, 2, 2), "z0": (3, 4, 4)}
ONES = dict.fromkeys(SHAPES, 1.0)
GOLDEN = Path(__file__).parents[2] / "golden" / "hflow"

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 1000)
times = st.floats(0, 1)


def pair(seed, batch=2):
    return draw(SHAPES, seed, range(batch)), draw(SHAPES, seed + 5000, range(batch))


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == np.float32
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def norms(latents, name):
    return np.linalg.norm(latents[name].reshape(len(latents[name]), -1).astype(np.float64), axis=1)


@quick
@given(seeds)
def test_both_paths_start_at_a_and_end_at_b(seed):
    a, b = pair(seed)
    for path in (lerp, slerp):
        same(path(a, b, 0.0), a)
        same(path(a, b, 1.0), b)


@quick
@given(seeds, times)
def test_both_paths_read_the_same_backwards(seed, t):
    a, b = pair(seed)
    for path in (lerp, slerp):
        there, back = path(a, b, t), path(b, a, 1 - t)
        for name in SHAPES:
            np.testing.assert_allclose(there[name], back[name], atol=2e-6)


@quick
@given(seeds, times)
def test_lerp_is_the_convex_combination(seed, t):
    a, b = pair(seed)
    mixed = lerp(a, b, t)
    for name in SHAPES:
        exact = a[name].astype(np.float64) * (1 - t) + b[name].astype(np.float64) * t
        np.testing.assert_allclose(mixed[name], exact, atol=1e-6)


@quick
@given(seeds, times)
def test_slerp_keeps_a_common_norm(seed, t):
    a, b = pair(seed)
    for latents in (a, b):
        for name in SHAPES:
            row_shape = (-1, *[1] * len(SHAPES[name]))
            latents[name] = (3 * latents[name] / norms(latents, name).reshape(row_shape)).astype(np.float32)
    mixed = slerp(a, b, t)
    for name in SHAPES:
        np.testing.assert_allclose(norms(mixed, name), 3, rtol=1e-5)


@quick
@given(seeds, times)
def test_slerp_treats_every_sample_alone(seed, t):
    a, b = pair(seed, 3)
    together = slerp(a, b, t)
    alone = [slerp(*({name: x[name][i : i + 1] for name in x} for x in (a, b)), t) for i in range(3)]
    for name in SHAPES:
        np.testing.assert_allclose(together[name], concatenate(alone)[name], atol=1e-7)


def test_slerp_turns_at_constant_speed():
    a, b = {"z": np.float32([[2, 0]])}, {"z": np.float32([[0, 2]])}
    for t in (0.25, 0.5, 0.9):
        expected = [[2 * np.cos(t * np.pi / 2), 2 * np.sin(t * np.pi / 2)]]
        np.testing.assert_allclose(slerp(a, b, t)["z"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1, 2, 3], [2, 4, 6]),
        ([1, 2, 3], [-1, -2, -3]),
        ([0, 0, 0], [1, 2, 3]),
        ([0.1, 0.7, 0.3], [0.3, 2.1, 0.9]),
    ],
    ids=["parallel", "opposite", "zero", "parallel-after-rounding"],
)
def test_slerp_without_an_angle_is_lerp(a, b):
    a, b = {"z": np.float32([a])}, {"z": np.float32([b])}
    for t in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(slerp(a, b, t)["z"], lerp(a, b, t)["z"], atol=1e-6)


def test_slerp_survives_cosines_past_one():
    a = draw({"z": (50,)}, 0, range(200))  # rounding takes about half of the 200 parallel pairs past 1
    b = {"z": 3 * a["z"]}
    np.testing.assert_allclose(slerp(a, b, 0.5)["z"], 2 * a["z"], rtol=1e-6)


def test_slerp_of_nearly_equal_items_stays_at_a():
    a, _ = pair(0)
    b = {name: values + np.float32(0.9e-3) for name, values in a.items()}
    b["z0"] = a["z0"] + np.float32(2e-3)  # far enough to move
    moved = slerp(a, b, 1.0)
    for name in ("end", "z1"):
        np.testing.assert_array_equal(moved[name], a[name])
    np.testing.assert_allclose(moved["z0"], b["z0"], atol=1e-6)


def test_joined_latents_turn_as_one_vector():
    a, b = pair(4)
    whole_a, whole_b = ({"v": np.concatenate([x["end"], x["z1"].reshape(2, -1)], axis=1)} for x in (a, b))
    joined = slerp(a, b, 0.4, joined=[("end", "z1")])
    whole = slerp(whole_a, whole_b, 0.4)["v"]
    assert list(joined) == list(SHAPES)
    np.testing.assert_array_equal(joined["end"], whole[:, :6])
    np.testing.assert_array_equal(joined["z1"], whole[:, 6:].reshape(2, 4, 2, 2))
    np.testing.assert_array_equal(joined["z0"], slerp(a, b, 0.4)["z0"])
    for groups in ([("end", "z7")], [("end",), ("end", "z1")]):
        with pytest.raises(DataError, match="unknown latent"):
            slerp(a, b, 0.4, joined=groups)


@pytest.mark.parametrize("mode", MODES)
def test_classes_take_the_straight_line(mode):
    """On the arc between two classes both would be 0.7 at once."""
    told = [{"labels": np.eye(3, dtype=np.float32)[[i]]} for i in (0, 2)]
    a, b = ({name: values[:1] for name, values in x.items()} | label for x, label in zip(pair(5), told, strict=True))
    path = list(interpolate(a, b, 3, mode, [("end", "z1")], ["labels"]))
    np.testing.assert_allclose(path[1]["labels"], [[0.5, 0, 0.5]], atol=1e-7)
    frames = list(random_walk([a, b], 2, True, mode, [("end", "z1")], (), ["labels"]))
    np.testing.assert_allclose(frames[1]["labels"], [[0.5, 0, 0.5]], atol=1e-7)
    for name in SHAPES:
        np.testing.assert_array_equal(frames[1][name], path[1][name])
    assert list(path[1]) == list(a)


@pytest.mark.parametrize("mode", MODES)
def test_interpolation_of_the_original(mode):
    stored = load_file(GOLDEN / "tiny32.io.safetensors")
    names = ("z2", "z1", "z0")
    a, b = ({name: stored[f"latent.{name}"][i : i + 1] for name in names} for i in (0, 1))
    mixed = {"lerp": lerp, "slerp": slerp}[mode](a, b, 0.3)
    # the case was made in float64 and stored in float32: nothing but the last bits may differ
    for name in names:
        expected = stored[f"interp.{mode}.{name}"]
        assert mixed[name].shape == expected.shape
        tolerance = 2 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(mixed[name], expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("path", [lerp, slerp])
def test_paths_need_matching_latents(path):
    a, b = pair(0)
    short = {name: values for name, values in b.items() if name != "z1"}
    with pytest.raises(DataError, match=r"'z1' is \[2, 4, 2, 2\] and missing"):
        path(a, short, 0.5)
    with pytest.raises(DataError, match=r"'z1' is missing and \[2, 4, 2, 2\]"):
        path(short, a, 0.5)
    with pytest.raises(DataError, match=r"'end' is \[2, 6\] and \[2, 7\]"):
        path(a, {**b, "end": np.zeros((2, 7), np.float32)}, 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_interpolate_steps_evenly_with_both_ends(mode):
    a, b = pair(1)
    frames = list(interpolate(a, b, 5, mode))
    assert len(frames) == 5
    same(frames[0], a)
    same(frames[-1], b)
    same(frames[1], {"lerp": lerp, "slerp": slerp}[mode](a, b, 0.25))


def test_interpolate_errors():
    a, b = pair(1)
    with pytest.raises(DataError, match="at least 2 frames; found 1"):
        interpolate(a, b, 1)
    with pytest.raises(DataError, match="one of lerp, slerp; found 'cubic'"):
        interpolate(a, b, 3, "cubic")


@quick
@given(st.integers(1, 50))
def test_ping_pong_loops_without_a_doubled_frame(n):
    order = ping_pong(n)
    assert len(order) == max(1, 2 * n - 2)
    assert order[:n] == list(range(n))
    if n > 1:
        assert all(abs(here - after) == 1 for here, after in zip(order, order[1:] + order[:1], strict=True))


def test_ping_pong_of_nothing():
    with pytest.raises(DataError, match="at least 1 frame; found 0"):
        ping_pong(0)


def test_mix_takes_the_named_latents():
    a, b = pair(2)
    same(mix(a, b, ["end", "z0"]), {"end": b["end"], "z1": a["z1"], "z0": b["z0"]})
    same(mix(a, b, []), a)
    with pytest.raises(DataError, match="unknown latent 'z7'; choose among end, z1, z0"):
        mix(a, b, ["z7"])


def test_resample_redraws_only_what_is_named():
    latents, _ = pair(3)
    prior, std = {**ONES, "z1": 2.0}, {**ONES, "z1": 0.3}
    again = resample(latents, ["z1"], SHAPES, prior, std, seed=9)
    same(again, {**latents, "z1": draw_latents(SHAPES, prior, 9, range(2), std)["z1"]})
    same(again, resample(latents, ["z1"], SHAPES, prior, std, seed=9))
    assert not np.array_equal(again["z1"], resample(latents, ["z1"], SHAPES, prior, std, seed=10)["z1"])
    with pytest.raises(DataError, match="unknown latent 'z7'"):
        resample(latents, ["z7"], SHAPES, prior, std, seed=9)
    with pytest.raises(DataError, match="latents to resample: latents do not fit the model: missing z0"):
        resample({"end": latents["end"], "z1": latents["z1"]}, ["z1"], SHAPES, prior, std, seed=9)


def keyframes(count, paths=1, shapes=SHAPES, scale=1.0):
    drawn = [draw(shapes, 5, range(key * paths, (key + 1) * paths)) for key in range(count)]
    return [{name: np.float32(scale) * values for name, values in key.items()} for key in drawn]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("joined", [(), [("end", "z1")]])
def test_random_walk_passes_through_its_keyframes(closed, mode, joined):
    keys = keyframes(3, paths=2)
    walk = list(random_walk(keys, 4, closed, mode, joined))
    assert len(walk) == (12 if closed else 9)
    for index, key in enumerate(keys):
        same(walk[4 * index], key)
    frames = concatenate(walk)["z0"].reshape(len(walk), 2, -1)
    for path in frames.swapaxes(0, 1):
        assert len(np.unique(path, axis=0)) == len(walk)
        steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
        if closed:  # the loop's seam is a step like the others
            assert 0.5 * steps.min() < np.linalg.norm(path[-1] - path[0]) < 1.5 * steps.max()


def test_random_walk_turns_at_constant_speed():
    turn = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]  # a quarter turn each: every step, the seam included, is the same
    walk = list(random_walk([{"z": np.float32([key])} for key in turn], 6))
    frames = np.concatenate([frame["z"] for frame in walk])
    steps = np.linalg.norm(np.roll(frames, -1, axis=0) - frames, axis=1)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)


def test_random_walk_keeps_the_std_all_along():
    walk = list(random_walk(keyframes(3, shapes={"z": (4000,)}), 5))
    assert all(abs(frame["z"].std() - 1) < 0.05 for frame in walk)


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("fixed", [["end"], ["end", "z1"], ["z0"]])
def test_fixed_latents_stay_and_the_others_walk_as_alone(closed, fixed):
    keys = keyframes(3)
    walk = list(random_walk(keys, 4, closed, "slerp", [("end", "z1")], fixed))
    moving = [name for name in SHAPES if name not in fixed]
    alone = [{name: key[name] for name in moving} for key in keys]
    groups = [[name for name in ("end", "z1") if name in moving]]
    for frame, expected in zip(walk, random_walk(alone, 4, closed, "slerp", [g for g in groups if g]), strict=True):
        same(frame, {name: keys[0][name] if name in fixed else expected[name] for name in SHAPES})


@pytest.mark.parametrize(("count", "steps"), [(0, 4), (1, 4), (3, 0)])
def test_random_walk_too_short(count, steps):
    with pytest.raises(DataError, match=f"found {count} and {steps}"):
        random_walk(keyframes(count), steps)


def test_random_walk_says_what_is_wrong_before_the_first_frame():
    keys = keyframes(3)
    with pytest.raises(DataError, match="unknown latent 'z7'; choose among end, z1, z0"):
        random_walk(keys, 4, fixed=["z7"])
    with pytest.raises(DataError, match="must move at least one latent"):
        random_walk(keys, 4, fixed=list(SHAPES))
    with pytest.raises(DataError, match="one of lerp, slerp; found 'cubic'"):
        random_walk(keys, 4, mode="cubic")
    with pytest.raises(DataError, match=r"'z0' is .* and missing"):
        random_walk([keys[0], {name: keys[1][name] for name in ("end", "z1")}], 4)


def test_concatenate():
    a, b = pair(0)
    both = concatenate([a, b])
    np.testing.assert_array_equal(both["z1"], np.concatenate([a["z1"], b["z1"]]))
    assert concatenate([a, {name: values[:1] for name, values in b.items()}])["end"].shape == (3, 6)
    with pytest.raises(DataError, match="found none"):
        concatenate([])
    with pytest.raises(DataError, match="'z0' is missing"):
        concatenate([a, {name: b[name] for name in ("end", "z1")}])


def test_files_keep_values_order_and_metadata(tmp_path):
    latents, _ = pair(6)
    latents["z1"] = np.asfortranarray(latents["z1"])  # memory order must not matter
    metadata = {"family": "hflow", "seed": 2**64 - 1, "std": {"end": 0.7}, "model": "ab12"}
    save_latents(tmp_path / "a.safetensors", latents, metadata)
    loaded, about = load_latents(tmp_path / "a.safetensors")
    same(loaded, latents)
    assert about == metadata
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        save_latents(tmp_path / "file" / "a.safetensors", pair(0)[0], {})


def headed(header):
    return {"hflow_rt.latents": header}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "holds tensors but no latents"),
        ({"hflow_rt": "{}"}, "holds tensors but no latents"),
        (headed("{"), "is not a whole latents file"),
        (headed("[]"), "is not a whole latents file"),
        (headed(json.dumps({"order": ["z0"]})), "is not a whole latents file"),
        (headed(json.dumps({"order": ["z0", "z1"], "metadata": {}})), "names differ"),
        (headed(json.dumps({"order": ["z0"], "metadata": 3})), "is not a whole latents file"),
    ],
)
def test_foreign_files_are_refused(tmp_path, metadata, message):
    save_file({"z0": np.zeros((1, 2), np.float32)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(DataError, match=message) as caught:
        load_latents(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(DataError, match="no latents file at"):
        load_latents(path)
    with pytest.raises(DataError, match="no latents file at"):
        load_latents(tmp_path)
    save_latents(path, pair(0)[0], {})
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-1], whole + b"x", b"\xff" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a whole latents file"):
            load_latents(path)


def test_check_latents_accepts_what_fits():
    check_latents(pair(0)[0], SHAPES, "sample")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z1": None}, r"missing z1 \[4, 2, 2\]"),
        ({"y": np.zeros((2, 3), np.float32)}, r"unexpected y \[3\]"),
        ({"z0": np.zeros((2, 3, 8, 8), np.float32)}, r"z0 is \[3, 8, 8\] there and \[3, 4, 4\] in the model"),
        ({"z0": np.zeros((3, 4, 4), np.float32)}, r"z0 is \[4, 4\] there and \[3, 4, 4\] in the model"),
        ({"end": np.float32(1)}, r"end is \[\] there"),
        ({"end": np.zeros((2, 6))}, "end is float64, not float32"),
        ({"end": np.full((2, 6), np.nan, np.float32)}, "end holds NaN or infinite values"),
        ({"end": np.full((2, 6), np.inf, np.float32)}, "end holds NaN or infinite values"),
        ({"end": np.zeros((1, 6), np.float32)}, "batch sizes 1, 2 where all must be equal"),
        ({name: np.zeros((0, *shape), np.float32) for name, shape in SHAPES.items()}, "an empty batch"),
        (dict.fromkeys(SHAPES), "missing end .*; missing z1 .*; missing z0 .*; use latents of this model$"),
        (
            {"end": None, "z1": None, "z0": None, "a": np.zeros((1, 2), np.float32)},
            "; and 1 more; use latents of this model$",
        ),
    ],
)
def test_check_latents_says_what_is_wrong(change, message):
    latents = {**pair(0)[0], **change}
    latents = {name: values for name, values in latents.items() if values is not None}
    with pytest.raises(DataError, match=message) as caught:
        check_latents(latents, SHAPES, "a.safetensors")
    assert str(caught.value).startswith("a.safetensors: latents do not fit the model: ")
