"""The real Triton Inference Server of the package nvidia-pytriton, on model repositories as users deploy them.

NVIDIA's ONNX Runtime backend comes with their image only. In its place a backend of the server's Python kind, called
onnxruntime, runs the very files. `make serving` installs the server.
"""

import os
import shlex
import shutil
import socket
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hflow_rt.export.serving import running

__all__ = ["SERVER", "Ports", "free_ports", "program", "served"]

VENV = Path(os.environ.get("HFLOW_TRITON_VENV", Path(__file__).parents[1] / ".venv-triton"))
PACKAGES = next(iter(VENV.glob("lib/python*/site-packages")), Path("none"))
SERVER = PACKAGES / "pytriton" / "tritonserver"
_STUB = "triton_python_backend_stub"

_BACKEND = """
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


class Ports(NamedTuple):
    """Where a server answers on this machine."""

    http: int
    grpc: int


def free_ports() -> Ports:
    """Two that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as http, socket.create_server(("127.0.0.1", 0)) as grpc:
        return Ports(http.getsockname()[1], grpc.getsockname()[1])


def program(folder: Path) -> Path:
    """A `tritonserver` that finds its libraries, its Python and its backends, which lie in `folder`."""
    backends = folder / "backends"
    if not backends.exists():
        shutil.copytree(SERVER / "backends" / "python", backends / "python")
        version = PACKAGES.parent.name.removeprefix("python")
        shutil.copy(SERVER / "python_backend_stubs" / version / _STUB, backends / "python")
        (backends / "onnxruntime").mkdir()
        (backends / "onnxruntime" / "model.py").write_text(_BACKEND)
    environment = {
        "LD_LIBRARY_PATH": f"{PACKAGES / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(PACKAGES),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }
    # not in a checkout, whose folders are not the package
    command = ["env", "-i", "-C", str(folder), *(f"{name}={value}" for name, value in environment.items())]
    command += [str(SERVER / "bin/tritonserver"), f"--backend-directory={backends}"]
    script = folder / "tritonserver"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    script.chmod(0o755)
    return script


@contextmanager
def served(models: Path, folder: Path, ports: Ports | None = None) -> Iterator[Ports]:
    """The server on a repository, its backends in `folder`, while it is needed."""
    ports = ports or free_ports()
    words = [f"--model-repository={models}", "--allow-metrics=false"]
    words += [f"--http-port={ports.http}", f"--grpc-port={ports.grpc}"]
    words += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    health = f"http://127.0.0.1:{ports.http}/v2/health/ready"
    with running([str(program(folder)), *words], health, lambda line: None, 120):
        yield ports
