"""`hflow-rt export --engine trt`: TensorRT engines beside the graphs of a bundle, exported first if need be."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hflow_rt.cli.common import named, need_extra, print_json, say_next, status
from hflow_rt.cli.export import GraphOptions, export_graphs, fail_on, print_report, proof_pictures

if TYPE_CHECKING:
    from hflow_rt.manifest import Manifest, Plan
    from hflow_rt.runtime.bundle import Bundle

__all__ = ["EngineOptions", "build_engines", "describe_engines", "describe_layers", "update_engines"]


@dataclass(frozen=True)
class EngineOptions:
    """What `export` was told about TensorRT, as it was typed; None where nothing."""

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
    wanted = GRAPHS if graphs.direction == "both" else (graphs.direction,)
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

    told = [graphs.direction != "both", graphs.bound, graphs.std, graphs.half, graphs.precision]
    if any((*told, options.capabilities, options.batch, options.workspace, options.refit)):
        raise ConfigError(
            "--update-weights keeps the bundle's graphs and engines as they are but for the weights; give it no other"
            " option but --out, --images and --flavor"
        )
    source, folder = _source_and_bundle(run, output)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"there is no bundle in {folder} to update; name the one with the engines with --out")
    old = find_bundle(folder)
    key = refittable(old, options.flavor)
    if _of_weights(old, source):
        raise BundleError(f"{folder} has the weights of {source} already; there is nothing to update")
    with status(quiet=quiet) as progress, atomic_directory(folder) as temporary:
        progress("exporting the new graphs")
        exported = temporary / BUNDLE
        fail_on(export_graphs(source, exported, _like(old.manifest, graphs.images), quiet=True).parity or {})
        _, key = refit_engines(find_bundle(exported), old, key, progress)
        for path in list(exported.iterdir()):
            path.rename(temporary / path.name)
        exported.rmdir()
    if len(old.manifest.engines) > 1 and not quiet:
        print(f"the other engines of {folder} were of the old weights: build them again", file=sys.stderr)
    _prove(find_bundle(folder), key, f" {folder}", graphs.images, quiet)


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
            print(f"{folder / plan.file}: {size:.1f} MB, {_told(plan)}")
        if report is not None:
            print_report(report)
        else:
            print(f"unverified: no GPU here can run them; there, run 'hflow-rt check{where} --backend trt'")
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
    from hflow_rt.manifest import MANIFEST, MODEL
    from hflow_rt.runs import ROOT, latest_run, resolve_run
    from hflow_rt.runtime.bundle import BUNDLE

    if run is None:
        try:
            run = latest_run()
        except CheckpointError:
            output = output or ROOT / PRETRAINED
            run = output if (output / MANIFEST).is_file() else pretrained()
            if not quiet:
                print(
                    f"no run under ./{ROOT}: this is {PRETRAINED}, the model that ships, in {output}", file=sys.stderr
                )
    if (run / MANIFEST).is_file():
        if output is None or output.resolve() == run.resolve():
            return _satisfying(run, run / MODEL, graphs, quiet)
        if output.exists():
            raise BundleError(f"{output} exists already, and a copy of {run} would replace it; choose another --out")
        with atomic_directory(output) as folder:
            shutil.copytree(run, folder, dirs_exist_ok=True)
        return _satisfying(output, output / MODEL, graphs, quiet)
    source = run if run.is_file() else resolve_run(run) / MODEL
    return _satisfying(output or source.parent / BUNDLE, source, graphs, quiet)


def _satisfying(folder: Path, source: Path, graphs: GraphOptions, quiet: bool) -> Path:
    """`folder`, exported from the model file `source` unless it is a bundle of just that already."""
    from hflow_rt.manifest import MANIFEST
    from hflow_rt.runtime.bundle import find_bundle

    if (folder / MANIFEST).is_file():
        if _of_weights(find_bundle(folder), source):
            lacking = _lacking(folder, graphs)
            if not lacking:
                return folder
            reason = f"{folder} lacks {lacking}"
        else:
            reason = f"{folder} is of other weights than {source}"
        if not quiet:
            print(f"{reason}: exporting its graphs again", file=sys.stderr)
    fail_on(export_graphs(source, folder, graphs, quiet).parity or {})
    return folder


def _of_weights(bundle: "Bundle", source: Path) -> bool:
    """Whether a bundle was exported from just this model file."""
    from hflow_rt.files import sha256

    checkpoint = bundle.manifest.checkpoint
    return sha256(source) in (checkpoint["sha256"], checkpoint.get("exported_from"))


def _source_and_bundle(run: Path | None, output: Path | None) -> tuple[Path, Path]:
    """The model file of a run, a bundle or a model file, and the bundle to update with it."""
    from hflow_rt.manifest import MANIFEST, MODEL
    from hflow_rt.runs import resolve_run
    from hflow_rt.runtime.bundle import BUNDLE

    if run is not None and (run / MANIFEST).is_file():
        return run / MODEL, output or run
    source = run if run is not None and run.is_file() else resolve_run(run) / MODEL
    return source, output or source.parent / BUNDLE


def _like(manifest: "Manifest", images: list[Path] | None) -> GraphOptions:
    """What to tell `export` for graphs like those of a bundle."""
    direction: Literal["forward", "inverse", "both"] = "both"
    if "inverse" not in manifest.graphs:
        direction = "forward"
    elif "forward" not in manifest.graphs:
        direction = "inverse"
    return GraphOptions(
        direction,
        images,
        "bound" in manifest.graphs,
        list(manifest.std),
        "exported_from" in manifest.checkpoint,
        manifest.precision,
    )


def _lacking(folder: Path, graphs: GraphOptions) -> str:
    """What the graphs of a bundle lack of what was asked for, in words; nothing if they will do."""
    from hflow_rt.runtime.bundle import find_bundle

    manifest = find_bundle(folder).manifest
    needed = ["forward", "inverse"] if graphs.direction == "both" else [graphs.direction]
    missing = [name for name in (*needed, *(["bound"] if graphs.bound else [])) if name not in manifest.graphs]
    if missing:
        return f"the graph {missing[0]}"
    if graphs.precision is not None and graphs.precision != manifest.precision:
        return f"{graphs.precision} arithmetic"
    if graphs.half and "exported_from" not in manifest.checkpoint:
        return "weights in half precision"
    if graphs.std is not None and tuple(graphs.std) != manifest.std:
        return f"std {' '.join(graphs.std)}"
    return ""
