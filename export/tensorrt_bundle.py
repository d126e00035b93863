"""TensorRT engines in bundles: built beside the graphs that are there or exported first, or given other weights."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hflow_rt.assets import is_installed
from hflow_rt.errors import BundleError, ConfigError
from hflow_rt.export.making import EngineOptions, GraphOptions, Tell, checked, model_and_bundle, nobody
from hflow_rt.export.tensorrt import (
    add_engines,
    parse_batch,
    parse_capabilities,
    refit_engines,
    refittable,
    target,
)
from hflow_rt.files import atomic_directory, exists, is_file
from hflow_rt.manifest import MANIFEST, read_manifest, routes_of
from hflow_rt.runs import ROOT
from hflow_rt.runtime.bundle import BUNDLE, Bundle, chosen_model, find_bundle
from hflow_rt.runtime.engines.cuda import chosen_gpu

__all__ = ["Made", "Make", "add_plans", "bundle_with", "is_of"]

Make = Callable[[Path, Path, GraphOptions], object]


class Made(NamedTuple):
    """A bundle, the key of its new engines, and how they were proved; None without a GPU: they stay unverified."""

    bundle: Bundle
    key: str
    report: dict[str, Any] | None


def add_plans(
    run: Path | None,
    output: Path | None,
    graphs: GraphOptions,
    options: EngineOptions,
    make: Make,
    progress: Tell = nobody,
    note: Tell = nobody,
    detail: Tell = nobody,
) -> Made:
    """Build engines into the bundle of `bundle_with`, or update those of one, and prove them where there is a GPU.

    progress, detail: hear of each step, and of the steps of each; note: of what else people should know. The report is
    not judged. Raises `HFlowError`.
    """
    if options.update:
        folder, key = _update(run, output, graphs, options, make, progress, note)
    else:
        # everything that can be refused is refused before the graphs are exported, which takes a while
        batch = None if options.batch is None else parse_batch(options.batch)
        capabilities = None if options.capabilities is None else parse_capabilities(options.capabilities)
        target(options.flavor, capabilities, options.refit)
        folder = bundle_with(run, output, graphs, make, note)
        bundle = find_bundle(folder)
        settings = options.workspace, bundle.manifest.graphs_for(graphs.route or "both"), options.refit
        _, key = add_engines(bundle, options.flavor, capabilities, batch, *settings, progress, detail)
    report = None
    if chosen_gpu() is not None:
        report = checked(find_bundle(folder), graphs.images, "trt", "cuda", None, progress, note)
    return Made(find_bundle(folder), key, report)


def _update(
    run: Path | None,
    output: Path | None,
    graphs: GraphOptions,
    options: EngineOptions,
    make: Make,
    progress: Tell,
    note: Tell,
) -> tuple[Path, str]:
    """Export the weights of `run` to the bundle there is, and give them to its engines without building those again.

    The bundle is replaced once everything is done, and as it was if anything fails.
    """
    if replace(graphs, images=None) != GraphOptions() or replace(options, flavor=None) != EngineOptions(update=True):
        raise ConfigError(
            "--update-weights keeps the bundle's graphs and engines as they are but for the weights; give it no other"
            " option but --out, --images and --flavor"
        )
    source, folder = model_and_bundle(run, output)
    if not is_file(folder / MANIFEST):
        raise BundleError(f"there is no bundle in {folder} to update; name the one with the engines with --out")
    old = find_bundle(folder)
    key = refittable(old, options.flavor)
    if is_of(folder, source):
        raise BundleError(f"{folder} has the weights of {source} already; there is nothing to update")
    with atomic_directory(folder) as temporary:
        progress("exporting the new graphs")
        exported = temporary / BUNDLE
        make(source, exported, replace(GraphOptions().filled(old.manifest), images=graphs.images))
        _, key = refit_engines(find_bundle(exported), old, key, progress)
        for path in list(exported.iterdir()):
            path.rename(temporary / path.name)
        exported.rmdir()
    if len(old.manifest.engines) > 1:
        note(f"the other engines of {folder} were of the old weights: build them again")
    return folder, key


def bundle_with(run: Path | None, output: Path | None, graphs: GraphOptions, make: Make, note: Tell) -> Path:
    """The folder of a bundle with the graphs that are wanted: the one that is there if it holds them, else exported.

    make: exports a model file to a folder. note: hears why, and which bundled model it is.
    """
    run, line = chosen_model(run)
    if line and is_installed(run):
        output = output or ROOT / run.name
        run = output if is_file(output / MANIFEST) else run
        note(f"{line}, in {output}")
    source, folder = model_and_bundle(run, output, graphs)
    bundle = source.parent
    if is_file(bundle / MANIFEST) and folder.resolve() != bundle.resolve():
        if not exists(folder):
            with atomic_directory(folder) as copy:
                shutil.copytree(bundle, copy, dirs_exist_ok=True)
        elif not is_of(folder, source):
            raise BundleError(f"{folder} exists already, and a copy of {bundle} would replace it; choose another --out")
    return _satisfying(folder, source, graphs, make, note)


def is_of(folder: Path, source: Path) -> bool:
    """Whether `folder` is a bundle of the weights in the file `source`."""
    if not is_file(folder / MANIFEST):
        return False
    return Bundle(folder, read_manifest(folder)).made_of(source)


def _satisfying(folder: Path, source: Path, graphs: GraphOptions, make: Make, note: Tell) -> Path:
    """`folder`, exported from the model file `source` unless it is a bundle of just that already."""
    if is_file(folder / MANIFEST):
        if is_of(folder, source):
            lacking, graphs = _lacking(folder, graphs)
            if not lacking:
                return folder
            reason = f"{folder} lacks {lacking}"
        else:
            reason = f"{folder} is of other weights than {source}"
        note(f"{reason}: exporting its graphs again")
    make(source, folder, graphs)
    return folder


def _lacking(folder: Path, graphs: GraphOptions) -> tuple[str, GraphOptions]:
    """What the graphs of a bundle lack of what was asked for, in words, and what to export then.

    Nothing if they will do. A route names the engines to build, so that the other's graph stays.
    """
    manifest = read_manifest(folder)
    known = GraphOptions().filled(manifest)
    wanted = graphs.filled(manifest)
    lacking = [route for route in routes_of(wanted.route or "both") if route not in manifest.routes]
    lacking = [route for route in lacking if route not in manifest.absent]
    wanted = replace(wanted, route="both" if lacking else known.route)
    if lacking:
        return f"the route {lacking[0]}", wanted
    if wanted.bound and not known.bound:
        return "the graph bound", wanted
    if wanted.precision != known.precision:
        return f"{wanted.precision} arithmetic", wanted
    if wanted.tune != known.tune:
        return f"--tune {wanted.tune}", wanted
    if wanted.half != known.half:
        return f"weights in {'half' if wanted.half else 'full'} precision", wanted
    if (wanted.resolution, wanted.region) != (known.resolution, known.region):
        return "that resolution and region", wanted
    if wanted.std != known.std:
        return f"std {' '.join(wanted.std or ())}", wanted
    return "", graphs
