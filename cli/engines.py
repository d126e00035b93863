"""`hflow-rt export --engine trt`: TensorRT engines beside the graphs of a bundle, exported first if need be."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hflow_rt.cli.graphs import export_graphs, print_report
from hflow_rt.cli.opening import named
from hflow_rt.cli.terminal import note, print_json, say, say_next, status
from hflow_rt.extras import need_extra
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from hflow_rt.export.making import EngineOptions, GraphOptions
    from hflow_rt.manifest import Manifest, Plan
    from hflow_rt.runtime.bundle import Bundle

__all__ = ["describe_engines", "describe_layers", "make_engines"]


def make_engines(
    run: Path | None, output: Path | None, graphs: "GraphOptions", options: "EngineOptions", quiet: bool
) -> None:
    """Add engines to the bundle of `run`, or update its weights, and tell what came of it."""
    if options.update:
        need_extra("train", "torch", "onnx", "onnxscript")
    need_extra("rtx", "onnx")
    from hflow_rt.export.making import fail_on
    from hflow_rt.export.tensorrt_bundle import add_plans

    def make(source: Path, folder: Path, wanted: "GraphOptions") -> None:
        fail_on(export_graphs(source, folder, wanted, quiet or options.update).parity or {})

    heard = (lambda line: None) if quiet else note
    with status(quiet=quiet) as progress:
        detail = progress if sys.stderr.isatty() else lambda text: None
        bundle, key, report = add_plans(run, output, graphs, options, make, progress, heard, detail)
    engines = bundle.manifest.engines[key]
    where = f" {quoted(bundle.path)}" if options.update else named(output or run)
    if quiet:
        print_json({"bundle": str(bundle.path), "key": key, **engines.model_dump(mode="json")})
    else:
        for plan in engines.plans.values():
            size = bundle.manifest.files[plan.file].bytes / 1e6
            say(f"{bundle.path / plan.file}: {size:.1f} MB, {_told(plan)}")
        if report is not None:
            print_report(report)
        else:
            say(f"unverified: no GPU here can run them; there, run 'hflow-rt check{where} --backend trt'")
        say_next(f"hflow-rt sample{where} --backend trt", f"hflow-rt info{where}")
    if report is not None:
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
