"""NVIDIA's Triton Inference Server on a model repository: found, started, waited for, ended. We write no server."""

import contextlib
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hflow_rt.errors import BackendUnavailable, BundleError
from hflow_rt.export.repository import model_name, write_repository
from hflow_rt.files import is_folder
from hflow_rt.names import quoted
from hflow_rt.runtime.bundle import Bundle

__all__ = ["IMAGE", "models_in", "program", "repository_for", "running"]

IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
_SHOWN = 12  # lines of what the server said before it ended


def repository_for(bundle: Bundle, cache: Path) -> Path:
    """The repository of just this bundle below `cache`, written if there is none yet. Raises as `write_repository`."""
    weights = str(bundle.manifest.checkpoint.get("sha256", ""))[:12]
    folder = cache / f"{model_name(bundle)}-{weights}"
    if not is_folder(folder):
        whole = folder.with_name(f".{folder.name}")
        shutil.rmtree(whole, ignore_errors=True)  # of one who was interrupted
        write_repository(bundle, whole)
        whole.rename(folder)
    return folder


def models_in(folder: Path) -> list[str]:
    """The models of a repository. Raises `BundleError` for a folder without any."""
    found = sorted(path.parent.name for path in folder.glob("*/config.pbtxt")) if is_folder(folder) else []
    if not found:
        raise BundleError(f"{folder} holds no models; write them with 'hflow-rt export --engine triton-repo'")
    return found


def program(named: str | None, folder: Path, http: int, grpc: int) -> str:
    """The server's program. Raises `BackendUnavailable`, which says how to run it from NVIDIA's image instead."""
    found = shutil.which(named or "tritonserver")
    if found is None:
        docker = (
            f"docker run --rm -p {http}:8000 -p {grpc}:8001 -v {quoted(folder.resolve())}:/models {IMAGE}"
            " sh -c \"pip install 'hflow-rt[cpu]' && tritonserver --model-repository=/models\""
        )
        raise BackendUnavailable(
            f"{named or 'tritonserver'} is not on this machine; its image serves as well: {docker}"
        )
    return found


@contextlib.contextmanager
def running(
    command: Sequence[str], health: str, progress: Callable[[str], None], seconds: float = 600
) -> Iterator["subprocess.Popen[bytes]"]:
    """The server while it runs, once it is ready; at the end it is asked to end, then made to.

    health: the address that tells. Raises `BackendUnavailable` where it ends before, or takes longer.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            _wait(process, health, said.fileno(), progress, seconds)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(
    process: "subprocess.Popen[bytes]", health: str, said: int, progress: Callable[[str], None], seconds: float
) -> None:
    progress("waiting for the server to load its models")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            lines = Path(f"/proc/self/fd/{said}").read_text(errors="replace").strip().splitlines()
            reasons = [line for line in lines if "rror" in line or "ailed" in line][-_SHOWN:] or lines[-_SHOWN:]
            raise BackendUnavailable(f"the server ended ({process.returncode}) and said: {' | '.join(reasons)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):  # another status raises
            return
        time.sleep(0.2)
    raise BackendUnavailable(f"the server was not ready after {seconds:.0f} s; look at the size of the models")
