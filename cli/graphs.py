"""Graphs written and proved, said as it happens; and the table of a parity report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hflow_rt.cli.opening import warn_if_busy
from hflow_rt.cli.terminal import note, say, status
from hflow_rt.extras import need_extra

if TYPE_CHECKING:
    from hflow_rt.export.making import GraphOptions
    from hflow_rt.manifest import Manifest

__all__ = ["export_graphs", "print_report"]


def export_graphs(source: Path, folder: Path, options: "GraphOptions", quiet: bool) -> "Manifest":
    """Write the graphs of the model file `source`, prove them, and say so unless quiet; see `wanted_graphs`."""
    need_extra("train", "torch", "onnx", "onnxscript")
    from hflow_rt.export import making

    wanted, _, _ = making.wanted_graphs(source, folder, options)
    if not quiet and wanted != options.filled(None):
        note(f"{folder} is exported again as it was:{wanted.words()}")
    if wanted.tune == "cpu":
        warn_if_busy(quiet)
    with status(quiet=quiet) as progress:
        manifest, gone = making.export_graphs(source, folder, options, progress, note)
    if gone:
        note(making.went(gone))
    assert manifest.parity is not None
    if not quiet:
        for graph in manifest.graphs.values():
            size = manifest.files[graph.file].bytes / 1e6
            say(f"{folder / graph.file}: {sum(graph.operators.values())} nodes, {size:.1f} MB")
        for name in sorted({file for graph in manifest.graphs.values() for file in graph.weights}):
            say(f"{folder / name}: their constants, {manifest.files[name].bytes / 1e6:.1f} MB")
        print_report(manifest.parity)
    return manifest


def print_report(report: dict[str, Any]) -> None:
    """The parity report as a table: by output, each statistic of its error and how much of the tolerance it takes."""
    from hflow_rt.runtime.latents.round_trips import RoundTrip

    mixed = report.get("mixed")
    say("error against float64, % of tolerance   rms          p99.9            max  torch max")
    for graph, outputs in report["pooled"].items():
        trip = graph == "round_trip"
        cases = [] if trip else report["graphs"][graph]
        for name, entry in outputs.items():
            judged = ((entry[one], entry["tolerance"].get(one)) for one in ("rms", "p99.9", "max"))
            columns = "  ".join(_of_tolerance(*pair) for pair in judged)
            title = "image round trip" if trip else f"{graph} {name}"
            line = f"  {title:24s} {columns}  {entry['torch_float32_max']:9.1e}"
            if "psnr_db" in entry:
                trips = [one for one in report["round_trip"] if one["path"] == "image"] if trip else []
                each = trips or [case["outputs"][name] for case in cases]
                line += f"  {min(one['psnr_db'] for one in each):3.0f} dB"
                line += f" of {mixed['round_trip_psnr_db' if trip else 'image_psnr_db']:.0f}" if mixed else ""
            say(line)
        differences = [case["bits_per_dim_difference"] for case in cases if "bits_per_dim_difference" in case]
        if differences:
            limit = mixed["bits_per_dim"] if mixed else None
            say(f"  {graph + ' bits/dim':24s} {'':30s}{_of_tolerance(max(differences), limit).rstrip()}")
    changed = report["pooled"].get("round_trip", {}).get("image")
    again = f"; {changed['uint8_differs']:.2%} of 8-bit values differ after a round trip" if changed else ""
    say(f"  ({report['images']} images{again})")
    if "came_back" in report:
        say(f"  read off in sequence, {RoundTrip(**report['came_back']).words()}")
    say("verified: the engines are the model" if report["passed"] else "NOT VERIFIED")


def _of_tolerance(error: float, tolerance: float | None) -> str:
    """For example `1.2e-07   24%`, without a share where nothing is judged."""
    share = 0.0 if tolerance is None else error / max(tolerance, 1e-30)
    shown = "" if tolerance is None else f"{share:.0%}" if share < 10 else ">999%"
    return f"{error:.1e} {shown:>5s}"
