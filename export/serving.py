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

IMAGE = "nvcr.io/nvidia/tritonserver:24.12-py3"  # the first with a Python that this package takes
_SHOWN = 12  # lines of what the server said before it ended


def repository_for(bundle: Bundle, cache: Path) -> Path:
    """The repository of just this bundle below `cache`, written if there is none yet. Raises as `write_repository`."""
    folder = cache / f"{model_name(bundle)}-{bundle.manifest.identity()[:12]}"
    if not is_folder(folder):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=cache) as temporary:
            whole = Path(temporary) / "whole"
            write_repository(bundle, whole)
            try:
                whole.rename(folder)
            except OSError:  # another one was faster
                if not is_folder(folder):
                    raise
    return folder


def models_in(folder: Path) -> list[str]:
    """The models of a repository. Raises `BundleError` for a folder without any."""
    found = sorted(path.parent.name for path in folder.glob("*/config.pbtxt")) if is_folder(folder) else []
    if not found:
        raise BundleError(f"{folder} holds no models; write them with 'hflow-rt export --engine triton-repo'")
    return found


def program(named: str | None, folder: Path, host: str, http: int, grpc: int) -> str:
    """The server's program. Raises `BackendUnavailable`, which says how to run it from NVIDIA's image instead."""
    found = shutil.which(named or "tritonserver")
    if found is None:
        docker = (
            f"docker run --rm -p {host}:{http}:8000 -p {host}:{grpc}:8001 -v {quoted(folder.resolve())}:/models {IMAGE}"
            " sh -c \"pip install 'hflow-rt[cpu]' && tritonserver --model-repository=/models\""
        )
        raise BackendUnavailable(
            f"{named or 'tritonserver'} is not on this machine; its image serves as well: {docker}"
        )
    return found


@contextlib.contextmanager
def running(
    command: Sequence[str], health: str, progress: Callable[[str], None], seconds: float = 600
) -> Iterator[Callable[[], None]]:
    """The server while it runs, once it is ready; at the end it is asked to end, then made to.

    Yields what waits until it ends by itself, and raises then. health: the address that tells. Raises
    `BackendUnavailable` where somebody else answers there, where it ends before, or takes longer.
    """
    if _answers(health):
        raise BackendUnavailable(f"somebody else answers at {health}; choose other ports")
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            _wait(process, health, said.fileno(), progress, seconds)
            yield lambda: _ended(process.wait(), said.fileno())
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
            _ended(process.returncode, said)
        if _answers(health):
            return
        time.sleep(0.2)
    raise BackendUnavailable(f"the server was not ready after {seconds:.0f} s; look at the size of the models")


def _ended(code: int, said: int) -> None:
    """Raise `BackendUnavailable` with what the server said of it."""
    lines = Path(f"/proc/self/fd/{said}").read_text(errors="replace").strip().splitlines()
    reasons = [line for line in lines if "rror" in line or "ailed" in line][-_SHOWN:] or lines[-_SHOWN:]
    raise BackendUnavailable(f"the server ended ({code}) and said: {' | '.join(reasons)}")


def _answers(health: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):  # another status raises
        return True
    return False
