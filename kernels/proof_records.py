"""What was proved where, kept in the user's cache folder so that the next process need not prove it again.

A file for each operator and all that could change what its kernels compute, so that processes never write over each
other's results. What cannot be read counts as not there, and what cannot be written is not kept: it costs a proof.
"""

import contextlib
import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hflow_rt.errors import DataError
from hflow_rt.files import atomic_file
from hflow_rt.kernels import dispatch

__all__ = ["Environment", "Record", "environment", "keep", "recall"]

_KEPT = 64  # records, the last that were written


@dataclass(frozen=True)
class Environment:
    """What a proof depends on. kernels: a digest of the source of this package."""

    gpu: str
    capability: str
    driver: str
    torch: str
    cuda: str
    triton: str
    kernels: str

    def __str__(self) -> str:
        return (
            f"{self.gpu} (compute capability {self.capability}, driver {self.driver}, torch {self.torch}, "
            f"CUDA {self.cuda}, triton {self.triton})"
        )


@dataclass(frozen=True)
class Record:
    """The outcome of a proof. date: UTC, `2026-01-31 23:59`. failure: what differed or did not run; empty if proved."""

    operator: str
    environment: Environment
    date: str
    failure: str = ""


def environment(device: torch.device) -> Environment:
    """That of `device`, a CUDA device; where Triton interprets, of any."""
    triton = "none" if dispatch.triton is None else str(dispatch.triton.__version__)
    if device.type != "cuda" or dispatch.INTERPRETED:
        return Environment("Triton's interpreter", "none", "none", torch.__version__, "none", triton, _source())
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    toolkit = torch.version.cuda or torch.version.hip or "unknown"
    name = torch.cuda.get_device_name(device)
    return Environment(name, capability, _driver(), torch.__version__, toolkit, triton, _source())


def recall(operator: str, where: Environment) -> Record | None:
    """What is kept of an operator; None where that is nothing, or nothing that can be read."""
    try:
        found = json.loads(_path(operator, where).read_text(encoding="utf-8"))
        record = Record(**{**found, "environment": Environment(**found["environment"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # whatever a damaged file holds
        return None
    whole = isinstance(record.date, str) and isinstance(record.failure, str)
    return record if whole and (record.operator, record.environment) == (operator, where) else None


def keep(record: Record) -> None:
    """Write it, and remove the oldest beyond what is kept."""
    with contextlib.suppress(OSError, DataError):
        path = _path(record.operator, record.environment)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
        others = sorted(path.parent.glob("[!.]*.json"), key=lambda other: other.stat().st_mtime, reverse=True)
        for old in others[_KEPT:]:
            old.unlink(missing_ok=True)


def _path(operator: str, where: Environment) -> Path:
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("hflow-rt", appauthor=False)) / "kernels"
    if not folder.is_absolute():  # nobody's home folder: "~" is no folder to make here
        raise OSError(f"{folder} is no absolute path")
    key = json.dumps([operator, asdict(where)])
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


@functools.cache
def _source() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _driver() -> str:
    """The version of the kernel module where Linux tells, and the newest CUDA that the driver speaks."""
    module = Path("/sys/module/nvidia/version")
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # builds without CUDA lack it
    told = [module.read_text().strip()] if module.is_file() else []
    return "/".join([*told, *([str(ask())] if ask else [])]) or "unknown"
