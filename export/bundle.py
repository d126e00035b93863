"""Build a bundle: fold, write the graphs, prove them, and only then give the folder its name."""

import contextlib
import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from hflow_rt import __version__
from hflow_rt.choices import Precision, Route, Routes, Tuning
from hflow_rt.errors import BundleError, CheckpointError, ConfigError, NoInverse
from hflow_rt.export.calibration import calibrate
from hflow_rt.export.onnx import OPSET, WEIGHTS, SharedWeights, export_graph
from hflow_rt.export.parity import run_parity
from hflow_rt.export.stored import stored_tensors, without_copies
from hflow_rt.export.tuning import Stopwatch
from hflow_rt.files import atomic_directory, atomic_file, exists, is_file, is_folder, is_ours, sha256
from hflow_rt.manifest import (
    HALF,
    MANIFEST,
    MODEL,
    STD,
    BundledFile,
    Manifest,
    graph_sha256,
    graphs_of,
    read_manifest,
    routes_of,
)
from hflow_rt.models.checkpoint import build_model, load_model, read_metadata, save_model, seen_at
from hflow_rt.models.describe import TABLES, described, latents_of, tables_of
from hflow_rt.models.family import LatentModel, Loop
from hflow_rt.models.registry import View
from hflow_rt.runtime.bundle import REPORT, Bundle
from hflow_rt.runtime.engines.cpu import threads
from hflow_rt.runtime.engines.plans import PLANS
from hflow_rt.runtime.noise import parse_std
from hflow_rt.runtime.session import open_bundle

__all__ = ["check_bundle", "export_bundle"]


def export_bundle(
    checkpoint: Path,
    output: Path,
    images: NDArray[np.float32],
    routes: Routes = "both",
    progress: Callable[[str], None] = lambda text: None,
    *,
    bound: bool = False,
    half: bool = False,
    calibration: str | None = None,
    std: Sequence[str] = STD,
    precision: Precision = "fp32",
    tuning: Tuning = "any",
    view: View | None = None,
) -> Manifest:
    """Export the model file `checkpoint` to the folder `output`, replacing a bundle that is there.

    images: `[N, C, R, R]` in [0, 1] for the parity check, which always runs with ONNX Runtime on the CPU; a
    failure leaves the bundle in place, marked unverified in its manifest. routes: those to write. bound: also write the
    graph that measures bits per dimension. calibration: first calibrate the model, in the form of `parse_calibration`;
    `model.safetensors` keeps what that changes, as with half: first round the weights to half precision, in which
    `model.safetensors` then keeps them; it is this rounded model, computed in float32 as ever, that the bundle holds
    and that its engines are held against. std: what samples are drawn at by default, in the form of `parse_std`.
    precision: of the arithmetic in the graphs. TensorRT engines of a bundle that is replaced stay if their graphs come
    out the same. tuning: `cpu` for graphs that run fast on the CPU of this machine, which is measured, and on no GPU.
    view: what images are to be, by default as the model file says; `model.safetensors` then says so.
    Raises `CheckpointError`, `BundleError`, `ConfigError`, `DataError`, `NoInverse`.
    """
    _check_replaceable(output)
    model, metadata = load_model(checkpoint), read_metadata(checkpoint)
    scaled = [latent.name for latent in latents_of(model) if latent.prior == "normal"]
    std = std if scaled else ()
    parse_std(std, scaled)
    with atomic_directory(output) as folder:
        changed = None if calibration is None else calibrate(model, metadata, calibration)
        half = half and metadata.get("weights") != HALF
        if half or view is not None or changed:
            model, metadata = _write_other(model, metadata | (changed or {}), folder / MODEL, half, view)
            metadata["exported_from"] = sha256(checkpoint)
        else:
            shutil.copyfile(checkpoint, folder / MODEL)
            metadata |= _origin(checkpoint)
        weights = sha256(folder / MODEL)
        specs = model.graphs()
        ways = _routes(model, routes)
        needed = {name for way in ways.values() for name in graphs_of(way)} | ({"bound"} if bound else set())
        needed |= specs.keys() & {"features"} if bound else set()
        if missing := sorted(needed - specs.keys()):
            raise BundleError(f"the {metadata['family']} family has no {missing[0]} graph")
        if "forward" in ways:  # the graphs of other spaces serve interpolation
            needed |= {name for space in model.spaces().values() for name in space.graphs}
        specs = {name: spec for name, spec in specs.items() if name in needed}
        if precision == "mixed" and tuning == "cpu":
            raise ConfigError("mixed precision is for GPUs and --tune cpu for CPUs; choose one of them")
        if precision == "mixed" and not all(spec.nets for spec in specs.values()):
            raise ConfigError(f"the {metadata['family']} family has no nets for mixed precision; use --precision fp32")
        worth = Stopwatch(threads()).worth if tuning == "cpu" else None
        graphs, shared = {}, SharedWeights(folder / WEIGHTS)
        halved = metadata.get("weights") == HALF
        stored = stored_tensors(folder / MODEL) if halved else {}
        for name, spec in specs.items():
            gains = (*spec.gains, 1.0) if halved else ()
            progress(f"{'writing' if worth is None else 'measuring'} {name}.onnx")
            notes = {"family": metadata["family"], "graph": name, "checkpoint_sha256": weights}
            graphs[name] = export_graph(spec, folder / f"{name}.onnx", notes, shared, gains, stored, precision, worth)
        graphs = without_copies(folder, graphs)
        for file, table in tables_of(model, ways).items():
            save_file(table, folder / file)
        manifest = Manifest(
            family=metadata["family"],
            std=tuple(std),
            **described(model, ways, graphs) | {"config": metadata["config"]},
            graphs=graphs,
            precision=precision,
            tuning=tuning,
            opset=OPSET,
            tools={"hflow-rt": __version__, **_versions("torch", "onnx", "onnxscript", "onnxruntime")},
            checkpoint={
                "sha256": weights,
                **{key: value for key, value in metadata.items() if key not in ("family", "config")},
            },
            files={
                path.name: BundledFile(sha256=sha256(path), bytes=path.stat().st_size)
                for path in sorted(folder.iterdir())
            },
        )
        session = open_bundle(Bundle(folder, manifest), "onnx", "cpu")
        manifest = _reported(manifest, run_parity(model, session, images, progress=progress))
        manifest = _with_old_engines(manifest, output, folder)
        for name in REPORT:
            if is_file(output / name):
                shutil.copyfile(output / name, folder / name)  # of the engines before; `bench` writes it anew
        (folder / MANIFEST).write_text(manifest.dump())
    return manifest


def check_bundle(
    bundle: Bundle,
    images: NDArray[np.float32],
    backend: str = "onnx",
    device: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
    *,
    keep: bool = True,
    cuda_graph: bool | None = None,
) -> dict[str, Any]:
    """Run the parity check on a finished bundle and return its report.

    keep: write into the manifest the report of the `onnx` backend, on the graphs, or of `trt`, on the engines.
    """
    for name in bundle.manifest.files:
        bundle.file(name)
    with open_bundle(bundle, backend, device, cuda_graph=cuda_graph) as session:
        report = run_parity(load_model(bundle.model), session, images, progress=progress)
        key = session.engines
    if keep and (backend == "onnx" or key is not None):
        manifest = read_manifest(bundle.path)  # checking takes a while, in which others may have added engines
        if _checked(manifest, key) != _checked(bundle.manifest, key):
            raise BundleError(f"{bundle.path} was exported again while it was checked; check it again")
        with atomic_file(bundle.path / MANIFEST) as temporary:
            temporary.write_text(_reported(manifest, report, key).dump())
    return report


def _routes(model: LatentModel, choice: Routes) -> dict[Route, str | Loop]:
    """The routes that were asked for; of both, those there are. Raises `NoInverse` for one that the family lacks."""
    routes = model.routes()
    if choice != "both" and choice not in routes:
        raise NoInverse(model.absent()[choice])
    return {route: routes[route] for route in routes_of(choice) if route in routes}


def _check_replaceable(output: Path) -> None:
    """Raise `BundleError` where something would be lost that is no part of a bundle: a web page has a manifest, too."""
    if not exists(output):
        return
    if not is_file(output / MANIFEST):
        raise BundleError(f"{output} exists and is not a bundle; choose another --out")
    names = {path.name for path in output.iterdir()}
    others = {name for name in names if not name.endswith(".onnx")}
    others -= {MANIFEST, MODEL, WEIGHTS, PLANS, *TABLES, *REPORT}
    if others:
        raise BundleError(
            f"{output} holds {min(others)}, which is no part of a bundle; move it, or choose another --out"
        )
    if MODEL not in names and not is_ours(output / MANIFEST):
        raise BundleError(f"{output} holds a {MANIFEST} that is not of a bundle; choose another --out")


def _checked(manifest: Manifest, key: str | None) -> dict[str, BundledFile]:
    """What a check of the graphs, or of the engines `key`, looks at."""
    return {
        name: file
        for name, file in manifest.files.items()
        if not name.startswith(f"{PLANS}/") or name.startswith(f"{PLANS}/{key}/")
    }


def _origin(checkpoint: Path) -> dict[str, Any]:
    """If `checkpoint` lies in a bundle, what that bundle's weights were rounded from."""
    with contextlib.suppress(BundleError):
        known = read_manifest(checkpoint.parent).checkpoint
        if "exported_from" in known and known["sha256"] == sha256(checkpoint):
            return {"exported_from": known["exported_from"]}
    return {}


def _with_old_engines(manifest: Manifest, old: Path, new: Path) -> Manifest:
    """The manifest with those engines of the bundle `old` that were built from the same graphs, copied to `new`."""
    with contextlib.suppress(BundleError):
        before = read_manifest(old)
        for key, engines in before.engines.items():
            same = all(
                name in manifest.graphs and graph_sha256(manifest, name) == plan.onnx
                for name, plan in engines.plans.items()
            )
            if same and is_folder(old / PLANS / key):
                shutil.copytree(old / PLANS / key, new / PLANS / key)
                files = {n: file for n, file in before.files.items() if n.startswith(f"{PLANS}/{key}/")}
                update = {"files": manifest.files | files, "engines": manifest.engines | {key: engines}}
                manifest = manifest.model_copy(update=update)
    return manifest


def _reported(manifest: Manifest, report: dict[str, Any], key: str | None = None) -> Manifest:
    """The manifest with a parity report on its graphs, or on the TensorRT engines `key`."""
    update: dict[str, Any] = {"parity": report, "verified": report["passed"]}
    if key is None:
        return manifest.model_copy(update=update)
    engines = manifest.engines | {key: manifest.engines[key].model_copy(update=update)}
    return manifest.model_copy(update={"engines": engines})


def _write_other(
    model: LatentModel, metadata: dict[str, Any], path: Path, half: bool, view: View | None
) -> tuple[LatentModel, dict[str, Any]]:
    """Write the model that was changed, perhaps with half-precision weights or another view of its images.

    Returns that model and what its file says.
    """
    state = model.state_dict()
    extra = {key: value for key, value in metadata.items() if key not in ("family", "config")}
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        extra["weights"] = HALF
        for name, value in state.items():
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"{name} exceeds the range of half precision (65504); export without --half")
    if view is not None:
        model = build_model(metadata["family"], seen_at(model.config, view))
    save_model(path, metadata["family"], model, state, extra)
    return load_model(path), read_metadata(path)


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
