"""`hflow-rt export --engine trt`: TensorRT engines beside the graphs of a bundle, exported first if need be."""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hflow_rt.cli.common import named, need_extra
from hflow_rt.cli.export import (
    GraphOptions,
    export_graphs,
    fail_on,
    model_and_bundle,
    print_report,
    proof_pictures,
)
from hflow_rt.cli.terminal import note, print_json, say, say_next, status
from hflow_rt.files import exists, is_file
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from hflow_rt.manifest import Manifest, Plan
    from hflow_rt.runtime.bundle import Bundle

__all__ = ["EngineOptions", "build_engines", "describe_engines", "describe_layers", "update_engines"]


@dataclass(frozen=True)
class EngineOptions:
    """What `export` was asked for of TensorRT, as it was typed; None where nothing was asked."""

    flavor: Literal["tensorrt", "rtx"] | None
    capabilities: str | None
    batch: str | None
    workspace: int | None
    refit: bool


def build_engines(
    run: Path | None, output: Path | None, graphs: GraphOptions, options: EngineOptions, quiet: bool
) -> None:
    """Add engines to the bundle of `run`, made or brought up to date first, and check them where there is a GPU."""
    need_extra("rtx", "onnx")
    from hflow_rt.export.tensorrt import GRAPHS, add_engines, parse_batch, parse_capabilities, target
    from hflow_rt.runtime.bundle import find_bundle

    # everything that can be refused is refused before the graphs are exported, which takes a while
    batch = None if options.batch is None else parse_batch(options.batch)
    capabilities = None if options.capabilities is None else parse_capabilities(options.capabilities)
    target(options.flavor, capabilities, options.refit)
    folder = _bundle_folder(run, output, graphs, quiet)
    wanted = GRAPHS if graphs.direction in (None, "both") else (graphs.direction,)
    with status(quiet=quiet) as progress:
        bundle, key = add_engines(
            find_bundle(folder),
            options.flavor,
            capabilities,
            batch,
            options.workspace,
            wanted,
            options.refit,
            progress,
            progress if sys.stderr.isatty() else lambda text: None,
        )
    _prove(bundle, key, named(output or run, ""), graphs.images, quiet)


def update_engines(
    run: Path | None, output: Path | None, graphs: GraphOptions, options: EngineOptions, quiet: bool
) -> None:
    """Export the weights of `run` to the bundle there is, and give them to its engines without building those again.

    The bundle is replaced once everything is done, and as it was if anything fails.
    """
    need_extra("train", "torch", "onnx", "onnxscript")
    from hflow_rt.errors import BundleError, ConfigError
    from hflow_rt.export.tensorrt import refit_engines, refittable
    from hflow_rt.files import atomic_directory
    from hflow_rt.manifest import MANIFEST
    from hflow_rt.runtime.bundle import BUNDLE, find_bundle

    if replace(graphs, images=None) != GraphOptions() or any(
        (options.capabilities, options.batch, options.workspace, options.refit)
    ):
        raise ConfigError(
            "--update-weights keeps the bundle's graphs and engines as they are but for the weights; give it no other"
            " option but --out, --images and --flavor"
        )
    source, folder = model_and_bundle(run, output)
    if not is_file(folder / MANIFEST):
        raise BundleError(f"there is no bundle in {folder} to update; name the one with the engines with --out")
    old = find_bundle(folder)
    key = refittable(old, options.flavor)
    if _is_of(folder, source):
        raise BundleError(f"{folder} has the weights of {source} already; there is nothing to update")
    with status(quiet=quiet) as progress, atomic_directory(folder) as temporary:
        progress("exporting the new graphs")
        exported = temporary / BUNDLE
        like = replace(GraphOptions().filled(old.manifest), images=graphs.images)
        fail_on(export_graphs(source, exported, like, quiet=True).parity or {})
        _, key = refit_engines(find_bundle(exported), old, key, progress)
        for path in list(exported.iterdir()):
            path.rename(temporary / path.name)
        exported.rmdir()
    if len(old.manifest.engines) > 1 and not quiet:
        note(f"the other engines of {folder} were of the old weights: build them again")
    _prove(find_bundle(folder), key, f" {quoted(folder)}", graphs.images, quiet)


def _prove(bundle: "Bundle", key: str, where: str, images: list[Path] | None, quiet: bool) -> None:
    """Check new engines where there is a GPU, and tell of them; `where` is how commands name their bundle."""
    from hflow_rt.runtime.bundle import find_bundle
    from hflow_rt.runtime.cuda import chosen_gpu

    folder, report = bundle.path, None
    if chosen_gpu() is not None:
        from hflow_rt.export.bundle import check_bundle

        need_extra("train", "torch")
        pictures = proof_pictures(images, bundle.manifest.resolution)
        with status(quiet=quiet) as progress:
            report = check_bundle(bundle, pictures, "trt", "cuda", progress)
        bundle = find_bundle(folder)
    engines = bundle.manifest.engines[key]
    if quiet:
        print_json({"bundle": str(folder), "key": key, **engines.model_dump(mode="json")})
    else:
        for plan in engines.plans.values():
            size = bundle.manifest.files[plan.file].bytes / 1e6
            say(f"{folder / plan.file}: {size:.1f} MB, {_told(plan)}")
        if report is not None:
            print_report(report)
        else:
            say(f"unverified: no GPU here can run them; there, run 'hflow-rt check{where} --backend trt'")
        say_next(f"hflow-rt sample{where} --backend trt", f"hflow-rt info{where}")
    if report is not None:
        fail_on(report)


def describe_engines(manifest: "Manifest") -> list[str]:
    """Lines about every set of engines that a manifest lists, for `info`."""
    from hflow_rt.runtime.plans import FLAVORS

    lines = []
    for key, engines in manifest.engines.items():
        verdict = "verified" if engines.verified else "UNVERIFIED" if engines.parity else "unverified: never run"
        machine = f"compute capability {', '.join(engines.capabilities)}"
        machine += f" ({engines.gpu})" if engines.gpu else ""
        verdict += ", refittable" if engines.refittable else ""
        sizes = ":".join(map(str, engines.batch))
        lines.append(f"  {FLAVORS[engines.flavor].title} {engines.version} for {machine}, batch {sizes}, {verdict}")
        lines.append(f"    {key}")
        for name, plan in engines.plans.items():
            size = manifest.files[plan.file].bytes / 1e6
            lines.append(f"    {name}: {size:.1f} MB, {_told(plan)}")
    return lines


def _told(plan: "Plan") -> str:
    """For example `layers 120 float of the network, built in 1.5 s`."""
    layers = ", ".join(f"{count} {kind}" for kind, count in plan.types.items())
    return (
        f"layers {layers} of the {plan.layers_of}, {'refitted' if plan.refitted else 'built'} in {plan.seconds:.1f} s"
    )


def describe_layers(bundle: "Bundle") -> list[str]:
    """Lines about every layer of every plan, and whose layers they are. Raises `BundleError`."""
    import json

    from hflow_rt.runtime.plans import build_command

    lines = []
    for key, engines in bundle.manifest.engines.items():
        for name, plan in engines.plans.items():
            whose = "as the engine runs them" if plan.layers_of == "engine" else "as the builder was given them"
            lines.append(f"  layers of {name} in {key}, {whose}:")
            listed = bundle.file(plan.layers, build_command(bundle.path, engines)).read_text(encoding="utf-8")
            for layer in map(json.loads, listed.splitlines()):
                inputs, outputs = (", ".join(map(_tensor, layer[end])) for end in ("inputs", "outputs"))
                lines.append(f"    {layer['type'].lower()} {layer['module'] or layer['name']}: {inputs} -> {outputs}")
    return lines


def _tensor(described: list[Any]) -> str:
    """For example `half Bx8x16x16`."""
    kind, sides = described
    return f"{kind} {'x'.join('B' if side == -1 else str(side) for side in sides) or 'scalar'}"


def _bundle_folder(run: Path | None, output: Path | None, graphs: GraphOptions, quiet: bool) -> Path:
    """The folder of a bundle with the graphs that are wanted: the one that is there if it holds them, else exported."""
    from hflow_rt.assets import PRETRAINED, pretrained
    from hflow_rt.errors import BundleError, CheckpointError
    from hflow_rt.files import atomic_directory
    from hflow_rt.manifest import MANIFEST
    from hflow_rt.runs import ROOT, latest_run

    if run is None:
        try:
            run = latest_run()
        except CheckpointError:
            output = output or ROOT / PRETRAINED
            run = output if is_file(output / MANIFEST) else pretrained()
            if not quiet:
                note(f"no run under ./{ROOT}: this is {PRETRAINED}, the bundled model, in {output}")
    source, folder = model_and_bundle(run, output)
    bundle = source.parent
    if is_file(bundle / MANIFEST) and folder.resolve() != bundle.resolve():
        if not exists(folder):
            with atomic_directory(folder) as copy:
                shutil.copytree(bundle, copy, dirs_exist_ok=True)
        elif not _is_of(folder, source):
            raise BundleError(f"{folder} exists already, and a copy of {bundle} would replace it; choose another --out")
    return _satisfying(folder, source, graphs, quiet)


def _is_of(folder: Path, source: Path) -> bool:
    """Whether `folder` is a bundle of the weights in the file `source`."""
    from hflow_rt.manifest import MANIFEST, read_manifest
    from hflow_rt.runtime.bundle import Bundle

    if not is_file(folder / MANIFEST):
        return False
    return Bundle(folder, read_manifest(folder)).made_of(source)


def _satisfying(folder: Path, source: Path, graphs: GraphOptions, quiet: bool) -> Path:
    """`folder`, exported from the model file `source` unless it is a bundle of just that already."""
    from hflow_rt.manifest import MANIFEST

    if is_file(folder / MANIFEST):
        if _is_of(folder, source):
            lacking, graphs = _lacking(folder, graphs)
            if not lacking:
                return folder
            reason = f"{folder} lacks {lacking}"
        else:
            reason = f"{folder} is of other weights than {source}"
        if not quiet:
            note(f"{reason}: exporting its graphs again")
    fail_on(export_graphs(source, folder, graphs, quiet).parity or {})
    return folder


def _lacking(folder: Path, graphs: GraphOptions) -> tuple[str, GraphOptions]:
    """What the graphs of a bundle lack of what was asked for, in words, and what to export then.

    Nothing if they will do. A direction names the engines to build, so that the other's graph stays.
    """
    from hflow_rt.manifest import read_manifest

    manifest = read_manifest(folder)
    known = GraphOptions().filled(manifest)
    wanted = graphs.filled(manifest)
    one_more = known.direction not in ("both", wanted.direction)
    wanted = replace(wanted, direction="both" if one_more else known.direction)
    if one_more:
        return f"the graph {'inverse' if known.direction == 'forward' else 'forward'}", wanted
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
