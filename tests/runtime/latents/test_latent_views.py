"""Tools that look into latents: each shows what it says, on every backend."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hflow_rt.errors import BundleError, DataError
from hflow_rt.manifest import BundledFile, Graph, Latent, Manifest, Tensor
from hflow_rt.runtime import BACKENDS, Session, load
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.engines.engine import Engine
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.latents import latent_views as views
from hflow_rt.runtime.latents.nearest import Nearest, TensorAddress, find_tensor
from hflow_rt.runtime.latents.nearest import points as points_of

ON_CPU = sorted(BACKENDS.keys() - {"trt"})  # TensorRT needs a GPU

R = 16
CLOSE = 2e-5  # rounding of float32 through the tiny model
NAMES = ["end0", "end1", "z1", "z0"]
Array = Any


@pytest.fixture(scope="module")
def sessions(tiny_run: Path) -> dict[str, Session]:
    return {backend: load(tiny_run, backend, "cpu") for backend in ON_CPU}


@pytest.fixture(params=ON_CPU)
def session(request: pytest.FixtureRequest, sessions: dict[str, Session]) -> Session:
    return sessions[request.param]


class ToyEngine(Engine):
    """x = 0.5 + 0.05 (a + b): `a` shifts an image, `b` each pixel, and `ignored` does nothing."""

    backend = "toy"

    def run(self, graph: str, inputs: Any) -> list[Array]:
        assert graph == "forward"
        a, _, b = inputs
        return [np.clip(np.float32(0.5) + np.float32(0.05) * (a + b), 0, 1)]

    def close(self) -> None:
        pass


@pytest.fixture
def toy(tmp_path: Path) -> Session:
    shapes = {"a": (1, 1, 1), "ignored": (5,), "b": (3, 4, 4)}
    graph = Graph(
        file="forward.onnx",
        inputs=tuple(Tensor(name=name, shape=shape, role="latent") for name, shape in shapes.items()),
        outputs=(Tensor(name="image", shape=(3, 4, 4), role="image"),),
        batch=(1, 8),
        operators={},
    )
    manifest = Manifest(
        family="toy",
        config={},
        resolution=4,
        latents=tuple(Latent(name=name, shape=shape, prior_std=1.0) for name, shape in shapes.items()),
        routes={"forward": "forward"},
        spaces={},
        graphs={"forward": graph},
        opset=20,
        tools={},
        checkpoint={"sha256": "0" * 64},
        files={"forward.onnx": BundledFile(sha256="0" * 64, bytes=0)},
    )
    bundle = Bundle(tmp_path, manifest)
    return Session(bundle, ToyEngine(bundle))


def drawn(session: Session, indices: range, std: float = 0.7, seed: int = 0) -> dict[str, Array]:
    return next(session.draw(indices, std, seed, len(indices)))


# parts of batches


def test_batches_put_together_are_the_batch(session: Session) -> None:
    latents = drawn(session, range(7))
    parts = list(views.batches(latents, 3))
    assert [len(part["z0"]) for part in parts] == [3, 3, 1]
    for name in NAMES:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), latents[name])
    one = views.select(latents, 5)
    np.testing.assert_array_equal(views.repeat(one, 3)["z1"], latents["z1"][[5, 5, 5]])


# walk


@pytest.mark.parametrize("space", ["z", "y0"])
@pytest.mark.parametrize("closed", [True, False])
def test_a_walk_shows_the_keyframes_and_closes(session: Session, space: str, closed: bool) -> None:
    frames = np.stack(list(views.walk(session, 2, 3, 6, seed=4, closed=closed, space=space)))
    assert frames.shape == (18 if closed else 13, 2, 3, R, R)
    images = session.sample(6, 0.7, seed=4)
    for path in range(2):
        for key in range(3):
            assert np.abs(frames[6 * key, path] - images[3 * path + key]).max() < CLOSE
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3, 4))
    assert (steps > 0).all()
    if closed:
        assert 0.3 * steps.min() < np.abs(frames[-1] - frames[0]).mean() < 2 * steps.max()


def test_walks_agree_between_backends(sessions: dict[str, Session]) -> None:
    onnx, torch = (
        np.stack(list(views.walk(session, 3, 2, 4, std=["z0=0.5"], mode="lerp", space="y0", fixed=["u1"])))
        for session in (sessions["onnx"], sessions["torch"])
    )
    assert np.abs(onnx - torch).max() < CLOSE
    assert np.ptp(onnx, axis=0).max() > 0.05


def test_a_walk_with_fixed_levels_moves_only_the_others(toy: Session) -> None:
    def walked(*fixed: str) -> Array:
        return np.stack(list(views.walk(toy, 2, 3, 4, fixed=fixed)))

    still = walked("a", "b")  # only what nobody sees moves
    np.testing.assert_array_equal(still, still[:1].repeat(12, axis=0))
    shifted = walked("b", "ignored")
    moved = shifted - shifted[:1]
    np.testing.assert_allclose(
        moved, moved.mean((2, 3, 4), keepdims=True).repeat(3, 2).repeat(4, 3).repeat(4, 4), atol=1e-6
    )
    assert np.abs(moved).max() > 0.01


def test_many_paths_and_few_come_frame_by_frame(toy: Session) -> None:
    for paths in (1, 5, 16, 40):
        frames = list(views.walk(toy, paths, 2, 10))
        assert [frame.shape for frame in frames] == [(paths, 3, 4, 4)] * 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": 0}, "the number of walks must be at least 1, not 0"),
        ({"keyframes": 1}, "at least 2 keyframes and 1 frame per segment; found 1 and 4"),
        ({"keyframes": 0}, "the number of keyframes must be at least 1, not 0"),
        ({"frames_per_segment": 0}, "the number of frames must be at least 1, not 0"),
        ({"fixed": ["z9"]}, "unknown latent 'z9'; choose among end0, end1, z1, z0"),
        ({"fixed": ["end0"], "space": "y0"}, "unknown latent 'end0'; choose among u0, u1, z1, z0"),
        ({"space": "w"}, "unknown space 'w' for this hflow model; known: z, y0"),
        ({"mode": "cubic"}, "one of lerp, slerp; found 'cubic'"),
        ({"std": 0}, "std must be a finite number > 0"),
    ],
)
def test_impossible_walks(sessions: dict[str, Session], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        views.walk(sessions["onnx"], **({"paths": 1, "keyframes": 2, "frames_per_segment": 4} | settings))
    assert "\n" not in str(caught.value)


# heat maps


def test_a_running_std_is_the_std() -> None:
    values = (100 + np.random.default_rng(0).normal(size=(50, 3, 4))).astype(np.float32)
    seen = views.RunningStd()
    for start, stop in ((0, 1), (1, 20), (20, 50)):
        seen.add(values[start:stop])
    assert seen.count == 50
    np.testing.assert_allclose(seen.std, values.astype(np.float64).std(0), rtol=1e-12)


@pytest.mark.parametrize(("name", "first"), [*((name, 1) for name in NAMES), ("z1", 5)])
def test_a_heat_map_is_the_std_over_redraws(session: Session, name: str, first: int) -> None:
    base = drawn(session, range(1), seed=3)
    found = views.heat_map(session, base, name, 10, std=0.8, seed=3, first=first, batch=4)
    redrawn = drawn(session, range(first, first + 10), 0.8, 3)
    mixed = {n: redrawn[n] if n == name else values.repeat(10, 0) for n, values in base.items()}
    expected = session.forward(mixed).astype(np.float64).std(0).mean(0)
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    assert found.max() > 100 * CLOSE


def test_a_latent_that_nobody_sees_has_a_black_map(toy: Session) -> None:
    base = drawn(toy, range(1))
    assert views.heat_map(toy, base, "ignored", 8).max() == 0
    level = views.heat_map(toy, base, "a", 200)  # the whole image moves together, by 0.05 stds
    np.testing.assert_allclose(level, level[0, 0], rtol=1e-5)
    assert abs(level[0, 0] - 0.05) < 0.01
    assert views.heat_map(toy, base, "b", 200).std() > 0


def test_a_heat_map_of_one_draw_is_refused(toy: Session) -> None:
    with pytest.raises(DataError, match="at least 2 redraws, not 1"):
        views.heat_map(toy, drawn(toy, range(1)), "a", 1)


# zeroing


def test_zeroing_goes_from_the_image_to_the_mean_image(session: Session) -> None:
    pixels = session.sample(3, 0.7)
    latents = session.inverse(pixels).latents
    steps = list(views.zeroing(session, latents))
    assert [zero for zero, _ in steps] == [
        (),
        ("z0",),
        ("z0", "z1"),
        ("z0", "z1", "end1"),
        ("z0", "z1", "end1", "end0"),
    ]
    np.testing.assert_array_equal(to_uint8(steps[0][1]), to_uint8(pixels))
    last = steps[-1][1]
    assert np.abs(last - last[:1]).max() < CLOSE  # nothing of the images is left
    np.testing.assert_allclose(steps[1][1], session.forward({**latents, "z0": 0 * latents["z0"]}), atol=CLOSE)
    assert all(np.abs(a - b).max() > CLOSE for (_, a), (_, b) in pairwise(steps))
    assert latents["z0"].any()  # the caller's are as they were


# temperatures


def test_temperatures_scale_every_latent(session: Session, toy: Session) -> None:
    latents = drawn(session, range(3))
    cold, same, half = views.temperatures(session, latents, [0, 1, 0.5])
    assert np.abs(cold - cold[:1]).max() < CLOSE  # nothing of the images is left
    assert np.abs(same - session.forward(latents)).max() < CLOSE
    assert np.abs(half - session.forward({name: values / 2 for name, values in latents.items()})).max() < CLOSE
    base = drawn(toy, range(2))
    for factor, images in zip((0.25, 2.0), views.temperatures(toy, base, [0.25, 2.0]), strict=True):
        np.testing.assert_allclose(images, 0.5 + 0.05 * factor * (base["a"] + base["b"]), atol=1e-6)


# a model of classes


class ToyClasses(ToyEngine):
    """The toy, brighter by 0.25 for the second class."""

    def run(self, graph: str, inputs: Any) -> list[Array]:
        *latents, kind = inputs
        return [super().run(graph, latents)[0] + np.float32(0.25) * kind[:, 1, None, None, None]]


@pytest.fixture
def classes(toy: Session, tmp_path: Path) -> Session:
    graph = toy.manifest.graphs["forward"]
    graph = graph.model_copy(update={"inputs": (*graph.inputs, Tensor(name="kind", shape=(2,), role="condition"))})
    update = {"conditions": {"kind": ("dark", "light")}, "graphs": {"forward": graph}}
    bundle = Bundle(tmp_path, toy.manifest.model_copy(update=update))
    return Session(bundle, ToyClasses(bundle))


def test_classes_stay_and_go_with_the_coarsest_latent(classes: Session) -> None:
    latents = drawn(classes, range(4))  # dark and light in turn
    bright = np.array([0, 0.25, 0, 0.25]).reshape(4, 1, 1, 1)
    for images in (
        next(views.temperatures(classes, latents, [0])),
        [*views.zeroing(classes, latents)][-1][1],
    ):
        np.testing.assert_allclose(images, (0.5 + bright) * np.ones_like(images), atol=1e-6)
    row, columns = views.select(latents, 1), views.select(latents, 2, 4)
    coarse = views.style_row(classes, row, columns, ["a"])
    np.testing.assert_allclose(coarse, 0.75 + 0.05 * (row["a"] + columns["b"]), atol=1e-6)
    fine = views.style_row(classes, row, columns, ["b"])
    np.testing.assert_allclose(fine, 0.5 + bright[2:] + 0.05 * (columns["a"] + row["b"]), atol=1e-6)


def test_walks_and_seeds_of_one_class(classes: Session) -> None:
    with pytest.raises(DataError, match="unknown option 'grey' of kind"):
        views.latents_of_seeds(classes, [1], 0.7, "grey")
    assert views.latents_of_seeds(classes, [1, 2], 0.7, "light")["kind"].tolist() == [[0, 1], [0, 1]]
    flat = {"mode": "lerp", "std": ["a=0.001", "b=0.001"]}
    between = np.stack(list(views.walk(classes, 1, 2, 4, **flat)))
    np.testing.assert_allclose(
        between.mean((1, 2, 3, 4)), [0.5, 0.5625, 0.625, 0.6875, 0.75, 0.6875, 0.625, 0.5625], atol=1e-3
    )
    light = np.stack(list(views.walk(classes, 1, 2, 4, option="light", **flat)))
    np.testing.assert_allclose(light, 0.75, atol=1e-3)
    assert views.heat_map(classes, views.select(latents := drawn(classes, range(2)), 1), "ignored", 4).max() == 0
    assert latents["kind"].tolist() == [[1, 0], [0, 1]]


# seeds


def test_images_of_seeds_are_the_first_of_each(session: Session) -> None:
    images = session.forward(views.latents_of_seeds(session, [7, 0, 2**64 - 1], 0.5))
    for image, seed in zip(images, (7, 0, 2**64 - 1), strict=True):
        assert np.abs(image - session.sample(1, 0.5, seed)[0]).max() < CLOSE


@pytest.mark.parametrize(
    ("texts", "seeds"),
    [
        (["5"], [5]),
        (["0-3"], [0, 1, 2, 3]),
        (["0-2", "20", "31"], [0, 1, 2, 20, 31]),
        (["3, 1-2,3"], [3, 1, 2, 3]),
        (["4-4"], [4]),
        (["0-4095"], list(range(4096))),
    ],
)
def test_seeds_by_name(texts: list[str], seeds: list[int]) -> None:
    assert views.parse_seeds(texts) == seeds


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one seed"),
        ([""], "numbers and ranges such as 7 or 0-15; found ''"),
        (["1,,2"], "found ''"),
        (["a"], "found 'a'"),
        (["-3"], "found '-3'"),
        (["1.5"], "found '1.5'"),
        (["9" * 5000], "found '999"),
        (["1-2-3"], "found '1-2-3'"),
        (["5-2"], "a range of seeds goes up; found '5-2'; write 2-5"),
        (["0-4096"], "at most 4096 seeds"),
        (["0-4000", "0-4000"], "at most 4096 seeds"),
        (["0-99999999999999999999"], "at most 4096 seeds"),
    ],
)
def test_seeds_that_make_no_sense(texts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        views.parse_seeds(texts)
    assert "\n" not in str(caught.value)


# mixing


def test_mixing_an_image_with_itself_gives_the_image(session: Session) -> None:
    latents = drawn(session, range(3))
    images = session.forward(latents)
    for cut in (None, *NAMES):
        names = views.coarse_down_to(session, cut)
        table = np.stack([views.style_row(session, views.select(latents, i), latents, names) for i in range(3)])
        for index in range(3):
            assert np.abs(table[index, index] - images[index]).max() < CLOSE
        assert np.abs(table[0, 1] - images[0]).max() > CLOSE or cut == "z0"
        assert np.abs(table[0, 1] - images[1]).max() > CLOSE


def test_the_cut_decides_who_gives_what(toy: Session) -> None:
    rows, columns = drawn(toy, range(2)), drawn(toy, range(2, 5))
    shift = views.style_row(toy, views.select(rows, 1), columns, ["a"])
    np.testing.assert_allclose(shift, 0.5 + 0.05 * (rows["a"][1:] + columns["b"]), atol=1e-6)
    whole = views.style_row(toy, views.select(rows, 1), columns, views.coarse_down_to(toy, "b"))
    np.testing.assert_allclose(whole, (0.5 + 0.05 * (rows["a"][1:] + rows["b"][1:])).repeat(3, 0), atol=1e-6)


def test_the_default_cut_is_in_the_middle(session: Session, toy: Session) -> None:
    assert views.coarse_down_to(session, None) == ["end0", "end1"]
    assert views.coarse_down_to(session, "z1") == ["end0", "end1", "z1"]
    assert views.coarse_down_to(toy, None) == ["a"]
    with pytest.raises(DataError, match="unknown latent 'u1'; choose among end0, end1, z1, z0"):
        views.coarse_down_to(session, "u1")
    latents = drawn(session, range(1))
    with pytest.raises(DataError, match="unknown latent 'u1'"):
        views.style_row(session, latents, latents, ["u1"])


# points and neighbours


def test_places_are_found_by_name(session: Session, toy: Session) -> None:
    assert find_tensor(session) == TensorAddress("y0", "u1")
    assert find_tensor(session, "u0") == TensorAddress("y0", "u0")
    for name in NAMES:
        assert find_tensor(session, name) == TensorAddress("z", name)
    assert find_tensor(toy) == TensorAddress("z", "a")  # a family without other spaces
    with pytest.raises(DataError, match="nothing is called 'w' in this model; choose among end0, end1, z1, z0, u0, u1"):
        find_tensor(session, "w")


def test_latents_are_found_in_a_bundle_without_other_spaces(sessions: dict[str, Session]) -> None:
    whole = sessions["onnx"]
    graphs = {name: graph for name, graph in whole.manifest.graphs.items() if name == "inverse"}
    bundle = Bundle(whole.bundle.path, whole.manifest.model_copy(update={"graphs": graphs}))
    one = Session(bundle, ToyEngine(bundle))
    assert find_tensor(one, "end0") == TensorAddress("z", "end0")
    with pytest.raises(BundleError, match="no 'end_forward' engine"):
        find_tensor(one)


def test_points_are_the_tensor_as_vectors(sessions: dict[str, Session]) -> None:
    latents = drawn(sessions["onnx"], range(3))
    for name, width in (("u0", 2), ("u1", 6), ("end1", 6), ("z1", 256)):
        found = {b: points_of(session, latents, find_tensor(session, name)) for b, session in sessions.items()}
        assert found["onnx"].shape == (3, width)
        np.testing.assert_allclose(found["onnx"], found["torch"], atol=CLOSE)
    np.testing.assert_array_equal(found["onnx"], latents["z1"].reshape(3, -1))
    inside = sessions["onnx"].into_space("y0", latents)["u1"]
    np.testing.assert_array_equal(points_of(sessions["onnx"], latents, TensorAddress("y0", "u1")), inside)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_nearest_are_those_of_a_full_search(size: int) -> None:
    rng = np.random.default_rng(1)
    points, queries = (rng.normal(size=(n, 2, 3)).astype(np.float32) for n in (40, 5))
    nearest = Nearest(queries, 4)
    for start in range(0, 40, size):
        nearest.add(points[start : start + size])
    distances = np.linalg.norm(queries.reshape(5, 1, 6).astype(np.float64) - points.reshape(1, 40, 6), axis=2)
    np.testing.assert_array_equal(nearest.indices, distances.argsort(axis=1)[:, :4])
    np.testing.assert_allclose(nearest.distances, np.sort(distances, axis=1)[:, :4], rtol=1e-12)


def test_an_image_of_the_set_finds_itself(session: Session) -> None:
    images = to_uint8(session.sample(20, 0.7, seed=2))
    tensor = find_tensor(session)
    points = points_of(session, session.inverse(images).latents, tensor)
    nearest = Nearest(points_of(session, session.inverse(images[[13, 4]]).latents, tensor), 3)
    nearest.add(points[:8])
    nearest.add(points[8:])
    assert nearest.indices[:, 0].tolist() == [13, 4]
    assert (nearest.distances[:, 0] < 1e-4).all()
    assert (nearest.distances[:, 1] > 1e-2).all()


def test_fewer_points_than_neighbours_and_ties() -> None:
    nearest = Nearest(np.zeros((1, 2), np.float32), 5)
    nearest.add(np.float32([[1, 0], [0, 1]]))
    nearest.add(np.float32([[0, 0]]))
    assert nearest.indices.tolist() == [[2, 0, 1]]
    assert nearest.distances.tolist() == [[0, 1, 1]]
    with pytest.raises(DataError, match="number of neighbours must be at least 1, not 0"):
        Nearest(np.zeros((1, 2), np.float32), 0)
