"""The real server on a repository as users deploy it, but for NVIDIA's ONNX Runtime backend, which needs their image.

In its place a backend of the server's Python kind, called onnxruntime, runs the very files. `make serving` installs the
server (the package nvidia-pytriton) into a virtualenv of its own, because it wants an older numpy.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hflow_rt.errors import BackendUnavailable, DataError
from hflow_rt.export.repository import write_repository
from hflow_rt.export.serving import running
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.client import Client

VENV = Path(os.environ.get("HFLOW_TRITON_VENV", Path(__file__).parents[2] / ".venv-triton"))
PACKAGES = next(iter(VENV.glob("lib/python*/site-packages")), Path("none"))
SERVER = PACKAGES / "pytriton" / "tritonserver"
pytestmark = pytest.mark.skipif(not SERVER.is_dir(), reason="needs the real server: make serving")

BACKEND = """
import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as server


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"))
        self.names, self.outputs = ([one["name"] for one in config[key]] for key in ("input", "output"))

    def execute(self, requests):
        given = [[server.get_input_tensor_by_name(one, name).as_numpy() for name in self.names] for one in requests]
        feeds = dict(zip(self.names, map(np.concatenate, zip(*given))))
        feeds = {one.name: feeds[one.name].reshape(-1, *one.shape[1:]) for one in self.session.get_inputs()}
        found = [array.reshape(len(array), *array.shape[1:] or [1]) for array in self.session.run(self.outputs, feeds)]
        ends = np.cumsum([len(one[0]) for one in given])[:-1]
        rows = zip(*[np.split(array, ends) for array in found])
        return [server.InferenceResponse(list(map(server.Tensor, self.outputs, row))) for row in rows]
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def address(tiny_run: Path, many_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    write_repository(find_bundle(tiny_run), folder / "models", name="tiny")
    write_repository(find_bundle(tiny_run), folder / "models", name="tiny")  # a second version
    write_repository(find_bundle(many_steps), folder / "models", name="many")
    backends = folder / "backends"
    shutil.copytree(SERVER / "backends" / "python", backends / "python")
    stub = SERVER / "python_backend_stubs" / PACKAGES.parent.name.removeprefix("python") / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    (backends / "onnxruntime").mkdir()
    (backends / "onnxruntime" / "model.py").write_text(BACKEND)
    http, grpc = free_port(), free_port()
    environment = {
        "LD_LIBRARY_PATH": str(PACKAGES / "nvidia_pytriton.libs"),
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(PACKAGES),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }
    words = [f"--model-repository={folder / 'models'}", f"--backend-directory={backends}", "--allow-metrics=false"]
    words += [f"--http-port={http}", f"--grpc-port={grpc}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    command = [
        "env",
        "-i",
        "-C",  # not in the checkout, whose folders are not the package
        str(folder),
        *(f"{name}={value}" for name, value in environment.items()),
        str(SERVER / "bin/tritonserver"),
        *words,
    ]
    with running(command, f"http://127.0.0.1:{http}/v2/health/ready", lambda line: None, 120):
        yield f"127.0.0.1:{grpc}"


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
        with pytest.raises(BackendUnavailable, match="has no such model"):
            client.forward({"start": np.zeros((1, 3, 4), np.float32)})


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
