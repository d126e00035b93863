"""Loops of fewer calls: which rows they take, what the calls do, and what is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hflow_rt.errors import DataError
from hflow_rt.models.checkpoint import load_model
from hflow_rt.runtime import load
from hflow_rt.runtime.latents.latent_views import between, samples
from hflow_rt.runtime.loops import shortened
from hflow_rt.runtime.session import Session


@pytest.fixture(scope="module")
def session(many_steps: Path) -> Session:
    return load(many_steps, device="cpu")


def test_rows_of_fewer_calls() -> None:
    """From the first to the last; what says where a call leads is taken before the next one."""
    calls = np.arange(7, dtype=np.float32)
    for steps, rows, ends in (
        (7, [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]),
        (4, [0, 2, 4, 6], [1, 3, 5, 6]),
        (3, [0, 3, 6], [2, 5, 6]),
        (1, [0], [6]),
    ):
        found = shortened({"at": calls, "end": calls}, ["end"], steps)
        assert {name: table.tolist() for name, table in found.items()} == {"at": rows, "end": ends}


def test_fewer_calls_extrapolate_what_the_network_knows(session: Session, many_steps: Path) -> None:
    """Two of four steps, written out in cosine waves: from level 4 to 1, and to 0."""
    import torch

    model = load_model(many_steps / "model.safetensors").double()
    config, delta = model.config, 0.25
    (latents,) = (fewer := session.in_steps(2)).draw(range(3), seed=5)
    start, start_noise = (torch.from_numpy(latents[name]).double() for name in ("start", "start_noise"))
    noise = torch.from_numpy(np.asarray(latents["noise"])).double()
    assert noise.shape == (3, 2, 3, 8, 8)
    from hflow_rt.models.ihdm.bank import Waves
    from hflow_rt.models.ihdm.blur import cosine_basis, damping

    basis, left = cosine_basis(8), damping(config)
    mean, variance = model.moments.double()
    u = Waves(config).rebuilt(start) + delta * start_noise
    for call, (level, reached) in enumerate(((4, 1), (1, 0))):
        m = model.mean(u, torch.full((3,), level))
        before, after = (torch.outer(left[k], left[k]) for k in (level - 1, reached))
        weight = variance * before**2 / (variance * before**2 + (0.5 * config.sigma) ** 2)
        gain = 1 + (after / before - 1) * weight
        c = basis @ m @ basis.T
        u = basis.T @ (mean * after + gain * (c - mean * before)) @ basis
        if call == 0:
            assert (u - m).abs().max() > 0.01
            u = u + delta * noise[:, 0]
    np.testing.assert_allclose(fewer.forward(latents), u.detach().clamp(0, 1).float(), atol=2e-5)
    np.testing.assert_array_equal(session.sample(3, seed=5, steps=2), fewer.forward(latents))


def test_all_calls_are_the_model_itself(session: Session) -> None:
    np.testing.assert_array_equal(session.sample(2, steps=4), session.sample(2))
    again = session.in_steps(2).in_steps(4)
    assert (again.steps, again.input_shapes) == (4, session.input_shapes)


def test_images_come_back_in_fewer_calls(session: Session) -> None:
    fewer = session.in_steps(3)
    images = np.random.default_rng(0).uniform(size=(2, 3, 8, 8)).astype(np.float32)
    found = fewer.inverse(images).latents
    assert found["noise"].shape == (2, 3, 3, 8, 8)
    np.testing.assert_allclose(fewer.forward(found), images, atol=1e-5)
    with pytest.raises(DataError, match=r"noise is \[3, 3, 8, 8\] there and \[4, 3, 8, 8\] in the model"):
        session.forward(found)


def test_fewer_calls_that_are_refused(session: Session, tiny_run: Path) -> None:
    with pytest.raises(DataError, match="the number of steps must be at least 1"):
        session.in_steps(0)
    with pytest.raises(DataError, match="the number of steps must be at most 4, of this ihdm model; found 5"):
        session.sample(1, steps=5)
    with pytest.raises(DataError, match="the number of steps is for models of many, and this hflow model takes one"):
        load(tiny_run, device="cpu").in_steps(1)
    manifest = session.manifest
    routes = {name: way.model_copy(update={"leads_to": ()}) for name, way in manifest.routes.items()}  # type: ignore[union-attr]
    manifest = manifest.model_copy(update={"routes": routes})
    bare = Session(dataclasses.replace(session.bundle, manifest=manifest), session._engine)
    assert bare.in_steps(4).steps == 4
    with pytest.raises(DataError, match="fewer than 4 steps need the mean and variance of training images, and this"):
        bare.in_steps(3)


def test_a_latent_of_the_start_needs_no_call(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).uniform(size=(2, 3, 8, 8)).astype(np.float32)
    expected = session.inverse(images).latents["start"]
    monkeypatch.setattr(session._engine, "loop", lambda *_: pytest.fail("a loop for its start"))
    np.testing.assert_array_equal(session.inverse(images, only="start").latents["start"], expected)


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_between_samples_colours_go_in_a_line_and_noise_turns(session: Session, mode: str) -> None:
    """As the original does, whatever the mode: noise keeps its variance."""
    ends = samples(session, 2, seed=6)
    half = np.sqrt(np.float32(0.5))
    weights = {"start": np.float32(0.5), "start_noise": half, "noise": half, "residual": np.float32(0.5)}
    middle = {name: weights[name] * (values[:1] + values[1:]) for name, values in ends.items()}
    assert middle["noise"].std() == pytest.approx(1, abs=0.05)
    found = np.concatenate(list(between(session, ends, 3, mode)))
    np.testing.assert_allclose(found[[0, 2]], session.forward(ends), atol=1e-5)
    np.testing.assert_allclose(found[1:2], session.forward(middle), atol=1e-5)
    # noise that both share stays what it is
    shared = ends | {"noise": ends["noise"][[0, 0]]}
    middle["noise"] = ends["noise"][:1]
    again = np.concatenate(list(between(session, shared, 3, mode)))
    np.testing.assert_allclose(again[1:2], session.forward(middle), atol=1e-5)
