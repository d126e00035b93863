"""How ONNX Runtime shares out images among threads, and what `tune` remembers of it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest

from hflow_rt.errors import BundleError, DataError
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.engines import cpu
from hflow_rt.runtime.engines.cpu import OPTIMISED, Settings, TunedGraph, shared_out, tuned_graph
from hflow_rt.runtime.engines.tune import forget, tune_runtime

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *name, **options: str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("images", "parts"), [(5, 2), (7, 3), (4, 4)])
def test_every_image_is_computed_once_and_in_its_place(images: int, parts: int) -> None:
    seen: list[int] = []

    def run(inputs: Any) -> list[Any]:
        row, x, y = inputs
        seen.append(len(x))
        return [row + x + y, y.sum(1)]

    x, y, row = np.arange(images * 2.0).reshape(images, 2), np.ones((images, 2)), np.array([[3.0, 5.0]])  # shared
    with ThreadPoolExecutor(parts) as pool:
        total, sums = shared_out(run, [row, x, y], parts, pool)
    assert np.array_equal(total, row + x + y)
    assert np.array_equal(sums, y.sum(1))
    assert sorted(seen) == sorted(len(piece) for piece in np.array_split(np.arange(images), parts))


@pytest.mark.parametrize(
    ("piece", "images", "parts"),
    [(2, 1, 1), (2, 2, 1), (2, 3, 3), (2, 4, 3), (2, 16, 8), (2, 17, 9), (1, 16, 16), (4, 64, 16), (0, 16, 1)],
)
def test_pieces_are_small_and_leave_no_thread_idle(
    monkeypatch: pytest.MonkeyPatch, piece: int, images: int, parts: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Settings(piece=piece).parts(images) == parts


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_a_batch_that_is_shared_out_is_the_same_batch(
    tiny_run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with load(tiny_run, "onnx", "cpu") as session:
        expected = session.sample(count, 0.7, seed=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with load(tiny_run, "onnx", "cpu") as session:
        np.testing.assert_allclose(session.sample(count, 0.7, seed=3), expected, atol=1e-5)
        encoded = session.inverse(expected)
        assert encoded.log_prob.shape == (count,)
        opened = {alone for _, alone in session._engine._sessions}  # type: ignore[attr-defined]
        assert opened == {count >= 3}  # a smaller batch takes all threads together


def test_threads_may_share_the_workers(tiny_run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with load(tiny_run, "onnx", "cpu") as session, ThreadPoolExecutor(4) as pool:
        wanted = [session.sample(3, 0.7, seed) for seed in range(8)]
        found = list(pool.map(lambda seed: session.sample(3, 0.7, seed), range(8)))
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_was_measured_is_kept_and_used(tiny_run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    bundle = find_bundle(tiny_run)
    found = tune_runtime(bundle, ["forward"], batch=3, rounds=1)["forward"]
    kept = [trial["what"] for trial in found["trials"] if trial["kept"]]
    assert [trial["batch"] for trial in found["trials"] if trial["kept"]] == [1, 3]
    assert len(found["trials"]) == 8
    assert ("2 images a thread at a time" in kept) == (found["settings"]["piece"] == 2)
    place = tuned_graph(bundle, "forward", onnxruntime.__version__)
    assert str(place.path) == found["path"]
    assert place.read() == Settings(**found["settings"])
    assert place.optimised is not None
    with load(tiny_run, "onnx", "cpu") as session:
        tuned = session.sample(3, 0.7)
    place.optimised.unlink()  # the settings hold without it
    with load(tiny_run, "onnx", "cpu") as session:
        assert session._engine.settings("forward") == place.read()  # type: ignore[attr-defined]
        np.testing.assert_allclose(session.sample(3, 0.7), tuned, atol=1e-5)
    assert forget(bundle, ["forward", "inverse"]) == ["forward"]
    assert place.read() is None
    assert not list(place.path.parent.iterdir())


def test_other_threads_runtimes_and_graphs_have_places_of_their_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    places = [TunedGraph("a", "1"), TunedGraph("b", "1"), TunedGraph("a", "2")]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    places.append(TunedGraph("a", "1"))
    monkeypatch.setattr(cpu, "_processor", lambda: "another")
    places.append(TunedGraph("a", "1"))
    assert len({place.path for place in places}) == 5
    assert {place.path.parent for place in places} == {cache / "tuned"}


@pytest.mark.parametrize("text", [b"{", b'{"width": 3}', b"[]", b'{"threads": "two"}', b'{"parts": 2.5}', b"\xff"])
def test_damaged_settings_are_one_line(tiny_run: Path, cache: Path, text: bytes) -> None:
    place = tuned_graph(find_bundle(tiny_run), "forward", onnxruntime.__version__)
    place.path.mkdir(parents=True)
    (place.path / "settings.json").write_bytes(text)
    with pytest.raises(BundleError, match="is damaged; measure again with 'hflow-rt tune'"):
        load(tiny_run, "onnx", "cpu").sample(1)


def test_a_damaged_optimised_graph_is_one_line(tiny_run: Path, cache: Path) -> None:
    place = tuned_graph(find_bundle(tiny_run), "forward", onnxruntime.__version__)
    place.write(Settings(threads=1), lambda path: path.write_bytes(b"no graph") and None)  # type: ignore[func-returns-value]
    assert json.loads((place.path / "settings.json").read_text())["threads"] == 1
    assert (place.path / OPTIMISED).is_file()
    with pytest.raises(BundleError, match=r"cannot open .*; measure again with 'hflow-rt tune'"):
        load(tiny_run, "onnx", "cpu").sample(1)


def test_other_constants_have_a_place_of_their_own(tiny_run: Path, cache: Path) -> None:
    """Most of a graph lies in the file of constants, and what is kept holds a copy of it."""
    bundle = find_bundle(tiny_run)
    changed = {"weights.bin": bundle.manifest.files["weights.bin"].model_copy(update={"sha256": "0" * 64})}
    other = Bundle(bundle.path, bundle.manifest.model_copy(update={"files": bundle.manifest.files | changed}))
    assert tuned_graph(bundle, "forward", "1").path != tuned_graph(other, "forward", "1").path


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny_run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bundle = find_bundle(tiny_run)
    opened = onnxruntime.InferenceSession

    def session(path: str, options: Any, **more: Any) -> Any:
        if options.optimized_model_filepath:
            raise RuntimeError("Protobuf serialization failed.")
        return opened(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(DataError, match=r"cannot keep the optimised graph in .*: Protobuf serialization failed"):
        tune_runtime(bundle, ["forward"], batch=1, rounds=1)
    assert not list((cache / "tuned").iterdir())


def test_what_is_left_of_a_batch_opens_no_second_session(
    tiny_run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with load(tiny_run, "onnx", "cpu") as session:
        assert session.side_by_side
        session.sample(2, 0.7)
        session.sample(1, 0.7)
        assert list(session._engine._sessions) == [("forward", True)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("batch", "pieces"), [(4, [2]), (8, [2, 0]), (16, [2, 1, 0]), (64, [2, 1, 4, 0])])
def test_ways_to_share_out_differ(
    tiny_run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, batch: int, pieces: list[int]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    tried: list[int] = []

    def first(bundle: Any, graph: str, images: int, ways: dict[str, Settings], rounds: int) -> Any:
        if images == batch:
            tried.extend(settings.piece for settings in ways.values())
        return [], next(iter(ways.values()))

    monkeypatch.setattr("hflow_rt.runtime.engines.tune._race", first)
    tune_runtime(find_bundle(tiny_run), ["forward"], batch=batch, rounds=1)
    assert tried == pieces


def test_the_cache_keeps_the_last(cache: Path) -> None:
    for index in range(cpu._KEPT + 3):
        place = TunedGraph(str(index), "1")
        place.write(Settings(), lambda path: path.write_bytes(b"") and None)  # type: ignore[func-returns-value]
        os.utime(place.path, (index, index))
    assert len(list((cache / "tuned").iterdir())) == cpu._KEPT
    assert place.read() == Settings()
    assert TunedGraph("0", "1").read() is None
