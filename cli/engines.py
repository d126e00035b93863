"""`hflow-rt export --engine trt`: TensorRT engines beside the graphs of a bundle, exported first if need be."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hflow_rt.cli.graphs import export_graphs, print_report
from hflow_rt.cli.opening import named
from hflow_rt.cli.terminal import note, print_json, say, say_next, status
from hflow_rt.extras import need_extra
from hflow_rt.files import is_file
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hflow_rt.export.making import GraphOptions
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
    run: Path | None, output: Path | None, graphs: "GraphOptions", options: EngineOptions, quiet: bool
) -> None:
    """Add engines to the bundle of `run`, made or brought up to date first, and check them where there is a GPU."""
    need_extra("rtx", "onnx")
    from hflow_rt.export.making import fail_on
    from hflow_rt.export.tensorrt import add_engines, parse_batch, parse_capabilities, target
    from hflow_rt.export.tensorrt_bundle import bundle_with
    from hflow_rt.runtime.bundle import find_bundle

    # everything that can be refused is refused before the graphs are exported, which takes a while
    batch = None if options.batch is None else parse_batch(options.batch)
    capabilities = None if options.capabilities is None else parse_capabilities(options.capabilities)
    target(options.flavor, capabilities, options.refit)

    def make(source: Path, folder: Path, options: "GraphOptions") -> None:
        fail_on(export_graphs(source, folder, options, quiet).parity or {})

    folder = bundle_with(run, output, graphs, make, (lambda line: None) if quiet else note)
    with status(quiet=quiet) as progress:
        bundle, key = add_engines(
            find_bundle(folder),
            options.flavor,
            capabilities,
            batch,
            options.workspace,
            graphs.direction or "both",
            options.refit,
            progress,
            progress if sys.stderr.isatty() else lambda text: None,
        )
    _prove(bundle, key, named(output or run, ""), graphs.images, quiet)


def update_engines(
    run: Path | None, output: Path | None, graphs: "GraphOptions", options: EngineOptions, quiet: bool
) -> None:
    """Export the weights of `run` to the bundle there is, and give them to its engines without building those again.

    The bundle is replaced once everything is done, and as it was if anything fails.
    """
    need_extra("train", "torch", "onnx", "onnxscript")
    from hflow_rt.errors import BundleError, ConfigError
    from hflow_rt.export.making import GraphOptions, fail_on, model_and_bundle
    from hflow_rt.export.tensorrt import refit_engines, refittable
    from hflow_rt.export.tensorrt_bundle import is_of
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
    if is_of(folder, source):
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


def _prove(bundle: "Bundle", key: str, where: str, images: "Sequence[Path] | None", quiet: bool) -> None:
    """Check new engines where there is a GPU, and tell of them; `where` is how commands name their bundle."""
    from hflow_rt.runtime.bundle import find_bundle
    from hflow_rt.runtime.engines.cuda import chosen_gpu

    folder, report = bundle.path, None
    if chosen_gpu() is not None:
        need_extra("train", "torch")
        from hflow_rt.export.making import checked

        with status(quiet=quiet) as progress:
            report = checked(bundle, images, "trt", "cuda", None, progress, note)
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
        from hflow_rt.export.making import fail_on

        fail_on(report)


def describe_engines(manifest: "Manifest") -> list[str]:
    """Lines about every set of engines that a manifest lists, for `info`."""
    from hflow_rt.runtime.engines.plans import FLAVORS

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

    from hflow_rt.runtime.engines.plans import build_command

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
