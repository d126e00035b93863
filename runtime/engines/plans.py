"""TensorRT's two products, and which of a bundle's plans fits this machine. Needs neither of them.

A plan is machine code for one GPU kind, one version of one product and one graph: everything that has to fit is in the
name of its folder (see `plans_key`) and in the manifest, and a plan that does not fit is refused before it is opened.
"""

import hashlib
import importlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hflow_rt.errors import BackendUnavailable, BundleError, EngineMismatch
from hflow_rt.extras import needed
from hflow_rt.manifest import Engines, Manifest, graph_sha256
from hflow_rt.names import quoted
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.engines.cuda import Gpu

__all__ = [
    "FLAVORS",
    "PLANS",
    "Flavor",
    "Product",
    "build_command",
    "choose_engines",
    "choose_refittable",
    "installed",
    "plan_file",
    "plans_key",
    "product",
]

Flavor = Literal["tensorrt", "rtx"]
PLANS = "trt"  # folder of a bundle


@dataclass(frozen=True)
class _Kind:
    """One of the two products: its Python module, its name, and the extra of ours that installs it."""

    module: str
    title: str
    extra: str


FLAVORS: dict[Flavor, _Kind] = {
    "tensorrt": _Kind("tensorrt", "TensorRT", "trt"),
    "rtx": _Kind("tensorrt_rtx", "TensorRT for RTX", "rtx"),
}


@dataclass(frozen=True)
class Product:
    """An installed product: its module, which is the API, and its version."""

    flavor: Flavor
    api: Any
    version: str

    @property
    def title(self) -> str:
        """Name and version for people."""
        return f"{FLAVORS[self.flavor].title} {self.version}"


def installed() -> list[Flavor]:
    """The products whose module is there."""
    return [flavor for flavor, kind in FLAVORS.items() if importlib.util.find_spec(kind.module) is not None]


def product(flavor: Flavor | None = None, gpu: Gpu | None = None) -> Product:
    """Import TensorRT: the `flavor` asked for, else the one that is installed.

    Where both are, TensorRT if there is a GPU, which it cannot build without, else TensorRT for RTX.
    Raises `BackendUnavailable`.
    """
    if flavor is None:
        found = installed()
        if not found:
            raise BackendUnavailable(
                "TensorRT engines need TensorRT for RTX (pip install 'hflow-rt[rtx]') or TensorRT"
                " (pip install 'hflow-rt[trt]'); neither is installed"
            )
        flavor = "rtx" if "rtx" in found and (gpu is None or "tensorrt" not in found) else found[0]
    kind = FLAVORS[flavor]
    with needed(
        kind.module, f"{kind.title} is missing or incomplete (no {kind.module}); pip install 'hflow-rt[{kind.extra}]'"
    ):
        api = importlib.import_module(kind.module)
    return Product(flavor, api, str(api.__version__))


def plans_key(
    flavor: Flavor,
    version: str,
    gpu: str | None,
    capabilities: Iterable[str],
    precision: str,
    batch: tuple[int, int, int],
    graphs: Mapping[str, str],
    refittable: bool = False,
) -> str:
    """Folder name of plans: all that must fit, the digests of the graphs (by name) shortened to eight digits."""
    machine = "" if gpu is None else re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + "-"
    architectures = "-".join("sm" + capability.replace(".", "") for capability in capabilities)
    digest = hashlib.sha256(" ".join(f"{name}:{graphs[name]}" for name in sorted(graphs)).encode()).hexdigest()
    kind = f"{precision}-refit" if refittable else precision
    return f"{flavor}-{version}-{machine}{architectures}-{kind}-b{'-'.join(map(str, batch))}-{digest[:8]}"


def build_command(bundle: Path, engines: Engines | None = None, capability: str | None = None) -> str:
    """The command that builds these plans again, or for another `capability`."""
    words = ["hflow-rt export", quoted(bundle), "--engine trt"]
    if engines is not None:
        words.append(f"--flavor {engines.flavor}")
        if engines.flavor == "rtx":
            words.append(f"--compute-capability {capability or ','.join(engines.capabilities)}")
        words.append(f"--batch {':'.join(map(str, engines.batch))}")
        if engines.workspace is not None:
            words.append(f"--workspace {engines.workspace}")
        if engines.refittable:
            words.append("--refit")
    return "'" + " ".join(words) + "'"


def choose_engines(bundle: Bundle, found: Product, gpu: Gpu) -> str:
    """The key of the newest plans that fit this product, version and GPU, and the bundle's graphs.

    Raises `EngineMismatch`, which says of the plans that come closest what does not fit, or `BundleError` where the
    bundle has none at all.
    """
    manifest = bundle.manifest
    if not manifest.engines:
        raise BundleError(f"{bundle.path} has no TensorRT engines; build them with {build_command(bundle.path)}")
    refusals = {key: _refusals(manifest, engines, found, gpu) for key, engines in manifest.engines.items()}
    fitting = [key for key, reasons in refusals.items() if not reasons]
    if fitting:
        # the newest of those that hold most
        return max(reversed(fitting), key=lambda key: len(manifest.engines[key].plans))
    key = min(reversed(list(refusals)), key=lambda key: len(refusals[key]))
    engines = manifest.engines[key]
    command = build_command(bundle.path, engines if engines.flavor == found.flavor else None, gpu.capability)
    raise EngineMismatch(f"the engines {key} do not fit: {'; '.join(refusals[key])}; build others with {command}")


def choose_refittable(bundle: Bundle, found: Product, gpu: Gpu) -> str:
    """The key of the newest refittable plans that `choose_engines` would take. Raises what it raises."""
    engines = {key: engines for key, engines in bundle.manifest.engines.items() if engines.refittable}
    if not engines:
        raise BundleError(
            f"{bundle.path} has no engines that were built with --refit, whose weights can be replaced; build some with"
            f" 'hflow-rt export {quoted(bundle.path)} --engine trt --flavor {found.flavor} --refit'"
        )
    return choose_engines(Bundle(bundle.path, bundle.manifest.model_copy(update={"engines": engines})), found, gpu)


def _refusals(manifest: Manifest, engines: Engines, found: Product, gpu: Gpu) -> list[str]:
    """What about these plans does not fit, in words."""
    if engines.flavor != found.flavor:
        return [f"they are for {FLAVORS[engines.flavor].title} and this is {found.title}", "", ""]
    reasons = []
    if engines.version != found.version:
        reasons.append(f"they are for version {engines.version} and this is {found.title}")
    if gpu.capability not in engines.capabilities:
        reasons.append(
            f"they are for compute capability {', '.join(engines.capabilities)} and {gpu.name} has {gpu.capability}"
        )
    elif engines.gpu is not None and engines.gpu != gpu.name:
        reasons.append(f"they are for {engines.gpu} and this is {gpu.name}")
    for name, plan in engines.plans.items():
        if name not in manifest.graphs or plan.onnx != graph_sha256(manifest, name):
            reasons.append(f"{name} was built from another {name}.onnx")
    return reasons


def plan_file(bundle: Bundle, key: str, graph: str) -> Path:
    """Path of a plan whose bytes are what the manifest says. Raises `BundleError` with the command that rebuilds."""
    engines = bundle.manifest.engines[key]
    if graph not in engines.plans:
        have = ", ".join(engines.plans)
        raise BundleError(f"there is no TensorRT engine of '{graph}' (there is: {have}); run it with --backend onnx")
    return bundle.file(engines.plans[graph].file, build_command(bundle.path, engines))
