"""The real inference server on a repository as users deploy it; see `triton_server` for what takes whose place."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from triton_server import SERVER, served

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.export.repository import write_repository
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.client import Client

pytestmark = pytest.mark.skipif(not SERVER.is_dir(), reason="needs the real server: make serving")


@pytest.fixture(scope="module")
def address(tiny_run: Path, many_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    write_repository(find_bundle(tiny_run), folder / "models", name="tiny")
    write_repository(find_bundle(tiny_run), folder / "models", name="tiny")  # a second version
    write_repository(find_bundle(many_steps), folder / "models", name="many")
    with served(folder / "models", folder) as ports:
        yield f"127.0.0.1:{ports.grpc}"


def test_answers_are_those_of_a_session(address: str, tiny_run: Path) -> None:
    session = load(tiny_run, device="cpu")
    with Client(address, "tiny") as client:
        np.testing.assert_array_equal(client.sample(3, std="0.5", seed=7), session.sample(3, std="0.5", seed=7))
        images = session.sample(2, seed=1)
        found, expected = client.inverse(images), session.inverse(images)
        assert found.latents.keys() == expected.latents.keys()
        for name, values in expected.latents.items():
            np.testing.assert_array_equal(found.latents[name], values)
        np.testing.assert_array_equal(found.log_prob, expected.log_prob)
        np.testing.assert_array_equal(client.forward(expected.latents), session.forward(expected.latents))
        latents = next(session.draw(range(70), seed=2, batch=70))  # more than the server takes at once
        np.testing.assert_allclose(client.forward(latents), session.forward(latents), atol=1e-5)


def test_requests_that_come_together(address: str, tiny_run: Path) -> None:
    session = load(tiny_run, device="cpu")
    parts = list(session.draw(range(24), seed=3, batch=1))
    with Client(address, "tiny") as client, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(client.forward, parts))
    for one, part in zip(found, parts, strict=True):
        np.testing.assert_allclose(one, session.forward(part), atol=1e-5)


def test_loops_controls_and_what_is_refused(address: str, many_steps: Path) -> None:
    session = load(many_steps, device="cpu")
    with Client(address, "many") as client:
        how = {"steps": 2, "controls": {"delta": 0.1}}
        np.testing.assert_array_equal(client.sample(2, seed=4, **how), session.sample(2, seed=4, **how))  # type: ignore[arg-type]
        with pytest.raises(DataError, match="the number of steps must be at most 4, of this ihdm model"):
            client.sample(1, steps=9)
        images = session.sample(18, seed=5)  # in two calls
        found, expected = client.inverse(images, seed=3, first=2), session.inverse(images, seed=3, first=2)
        assert found.latents.keys() == expected.latents.keys()
        assert found.scores.keys() == expected.scores.keys()
        for name, values in {**expected.latents, **expected.scores}.items():
            np.testing.assert_array_equal({**found.latents, **found.scores}[name], values)
        np.testing.assert_array_equal(client.forward(found.latents), session.forward(expected.latents))
        for wrong, line in (({"odd": images}, "unknown 'odd'"), ({"start": images}, "refused")):
            with pytest.raises(DataError, match=line):
                client.forward(wrong)
        with pytest.raises(BackendUnavailable, match="has no such model"):
            Client(address, "none").forward({"start": images})


def test_malformed_requests_leave_it_alive(address: str) -> None:
    rng = np.random.default_rng(0)
    with Client(address, "tiny") as client:
        grpc = client._grpc
        for _ in range(200):
            shape = tuple(rng.integers(0, 5, rng.integers(1, 5)))
            tensor = grpc.InferInput(rng.choice(["image", "z0", "odd"]), shape, "FP32")
            tensor.set_data_from_numpy(rng.standard_normal(shape).astype(np.float32))
            with pytest.raises(grpc.InferenceServerException):
                client._client.infer(rng.choice(["tiny_inverse", "tiny_forward", "no"]), [tensor])
        assert client.sample(1).shape[0] == 1
