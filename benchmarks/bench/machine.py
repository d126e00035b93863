"""What figures were measured on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["busy", "machine"]

_BUSY = 0.3  # of a core that others may use before it is pointed out
_PACKAGES = ("hflow-rt", "torch", "triton", "onnxruntime", "onnxruntime-gpu", "openvino", "onnx", "tensorrt", "numpy")


def machine() -> dict[str, Any]:
    """Processor, GPU and driver, versions, and the commit where this is a checkout; None for what is not there."""
    gpu = _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": gpu and gpu.partition(",")[0],
        "driver": gpu and gpu.partition(",")[2].strip(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        **{name: _version(name) for name in _PACKAGES},
    }


def busy() -> str | None:
    """A line if other work used this machine in the minute before, so that figures mislead; None where it was idle."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"other work used {load:.1f} cores in the minute before" if load > _BUSY else None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _said(*command: str) -> str | None:
    """The first line a command prints; nothing where it fails or is not there."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip() if lines else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
