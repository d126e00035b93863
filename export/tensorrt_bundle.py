"""Which bundle TensorRT engines are added to: the one that is there, or one exported first."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hflow_rt.assets import PRETRAINED, pretrained
from hflow_rt.errors import BundleError, CheckpointError
from hflow_rt.export.making import GraphOptions, checked, fail_on, model_and_bundle
from hflow_rt.export.tensorrt import add_engines
from hflow_rt.files import atomic_directory, exists, is_file
from hflow_rt.manifest import MANIFEST, read_manifest, routes_of
from hflow_rt.runs import ROOT, latest_run
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.engines.cuda import chosen_gpu

__all__ = ["Make", "add_plans", "bundle_with", "is_of"]

Make = Callable[[Path, Path, GraphOptions], object]


def add_plans(
    run: Path | None,
    output: Path | None,
    graphs: GraphOptions,
    make: Make,
    progress: Callable[[str], None],
    note: Callable[[str], None],
) -> Path:
    """Build engines for the GPU that is here into the bundle of `bundle_with`, prove them there, return its folder.

    progress: hears of each step; note: of what else people should know. Raises `ParityError` where one differs.
    Without a GPU they stay unverified.
    """
    folder = bundle_with(run, output, graphs, make, progress)
    bundle, _ = add_engines(find_bundle(folder), routes=graphs.direction or "both", progress=progress)
    if chosen_gpu() is not None:
        fail_on(checked(bundle, graphs.images, "trt", "cuda", None, progress, note))
    return folder


def bundle_with(
    run: Path | None, output: Path | None, graphs: GraphOptions, make: Make, note: Callable[[str], None]
) -> Path:
    """The folder of a bundle with the graphs that are wanted: the one that is there if it holds them, else exported.

    make: exports a model file to a folder. note: hears why, and which model it is where none was named.
    """
    if run is None:
        try:
            run = latest_run()
        except CheckpointError:
            output = output or ROOT / PRETRAINED
            run = output if is_file(output / MANIFEST) else pretrained()
            note(f"no run under ./{ROOT}: this is {PRETRAINED}, the bundled model, in {output}")
    source, folder = model_and_bundle(run, output)
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


def _satisfying(folder: Path, source: Path, graphs: GraphOptions, make: Make, note: Callable[[str], None]) -> Path:
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

    Nothing if they will do. A direction names the engines to build, so that the other's graph stays.
    """
    manifest = read_manifest(folder)
    known = GraphOptions().filled(manifest)
    wanted = graphs.filled(manifest)
    lacking = [route for route in routes_of(wanted.direction or "both") if route not in manifest.routes]
    lacking = [route for route in lacking if route not in manifest.absent]
    wanted = replace(wanted, direction="both" if lacking else known.direction)
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
    if wanted.std != known.std:
        return f"std {' '.join(wanted.std or ())}", wanted
    return "", graphs
