"""`hflow-rt serve` with the real inference server."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from outcomes import INTERRUPTIBLE
from triton_server import SERVER, free_ports, program

from hflow_rt.errors import BackendUnavailable
from hflow_rt.runtime import load
from hflow_rt.runtime.client import Client

pytestmark = pytest.mark.skipif(not SERVER.is_dir(), reason="needs the real server: make serving")


def test_from_its_start_to_ctrl_c(tiny_run: Path, tmp_path: Path) -> None:
    ports, name = free_ports(), tiny_run.name
    words = ["--server", program(tmp_path), "--http", str(ports.http), "--grpc", str(ports.grpc)]
    command = [sys.executable, "-c", INTERRUPTIBLE, "serve", tiny_run, *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(120, process.terminate)
        watchdog.start()
        assert process.stdout is not None
        at = f"http://127.0.0.1:{ports.http}"
        told = [process.stdout.readline(), process.stdout.readline()]
        try:
            with Client(f"127.0.0.1:{ports.grpc}", name) as client:
                found = client.sample(2, seed=1)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait()
            watchdog.cancel()
    assert code == 0
    assert f"{name}_forward" in told[0]
    assert told[0].endswith(f" at {at}, gRPC 127.0.0.1:{ports.grpc}\n")
    assert told[1] == f"try: curl {at}/v2/models/{name}_forward/config\n"
    np.testing.assert_array_equal(found, load(tiny_run, device="cpu").sample(2, seed=1))
    with pytest.raises(BackendUnavailable, match="does not answer"):
        Client(f"127.0.0.1:{ports.grpc}", name, timeout=2)
