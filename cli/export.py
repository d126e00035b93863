"""`hflow-rt export` and `hflow-rt check`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import (
    BackendOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    locate_bundle,
    named,
    need_extra,
    print_json,
    read_pictures,
    say_next,
    status,
)

_ENGINES = ("onnx",)
# Images for the proof: in float64, 256x256 takes seconds each.
_IMAGES, _LARGE_IMAGES = 8, 3


class _Direction(StrEnum):
    forward = "forward"
    inverse = "inverse"
    both = "both"


_ImagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--images",
        help="Images to prove the engines on (the first 8, or 3 above 64x64); else bundled ones.",
        show_default=False,
    ),
]


@app.command()
def export(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A run or a model file; without it the latest run.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option(help="What to build: onnx.")] = "onnx",
    direction: Annotated[
        _Direction, typer.Option(help="forward is latents to image, inverse image to latents.")
    ] = _Direction.both,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The bundle's folder; by default RUN/bundle.", show_default=False),
    ] = None,
    images: _ImagesOption = None,
    bound: Annotated[
        bool, typer.Option("--bound", help="Also the engine of 'eval bpd', which measures bits per dimension.")
    ] = False,
    std: Annotated[
        list[str] | None,
        typer.Option(
            "--std", metavar="S|NAME=S", help="What to draw samples at where nobody says; 0.7.", show_default=False
        ),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Round the weights to half precision first; arithmetic stays float32.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write the engines of a trained model and prove that they are that model.

    Example: hflow-rt export --engine onnx
    """
    from hflow_rt.errors import BackendUnavailable

    if engine not in _ENGINES:
        raise BackendUnavailable(f"this version builds no '{engine}' engines; known: {', '.join(_ENGINES)}")
    need_extra("train", "torch", "onnx", "onnxscript")
    from hflow_rt.export.bundle import export_bundle
    from hflow_rt.manifest import MODEL, STD
    from hflow_rt.models.checkpoint import parse_config, read_metadata
    from hflow_rt.models.family import family
    from hflow_rt.runs import resolve_run
    from hflow_rt.runtime.bundle import BUNDLE

    source = run if run is not None and run.is_file() else resolve_run(run) / MODEL
    folder = output or source.parent / BUNDLE
    metadata = read_metadata(source)
    config: Any = parse_config(family(metadata["family"]).config, metadata["config"])
    pictures = _pictures(images, config.resolution)
    with status(quiet=json) as progress:
        manifest = export_bundle(
            source, folder, pictures, direction.value, progress, bound=bound, half=half, std=std or STD
        )
    report = manifest.parity
    assert report is not None
    if json:
        print_json(
            {
                "bundle": str(folder),
                "graphs": list(manifest.graphs),
                "verified": manifest.verified,
                "parity": report,
            }
        )
    else:
        for graph in manifest.graphs.values():
            size = manifest.files[graph.file].bytes / 1e6
            print(f"{folder / graph.file}: {sum(graph.operators.values())} nodes, {size:.1f} MB")
        for name in sorted({graph.weights for graph in manifest.graphs.values() if graph.weights}):
            print(f"{folder / name}: their constants, {manifest.files[name].bytes / 1e6:.1f} MB")
        _print_report(report)
        say_next("hflow-rt sample" if run is None else f"hflow-rt sample {folder}")
    _fail_on(report)


@app.command()
def check(
    model: ModelArgument = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    images: _ImagesOption = None,
    json: JsonOption = False,
) -> None:
    """Compare every engine of a bundle with the torch reference in float64; exit 1 if one differs.

    Example: hflow-rt check --images photos/
    """
    from hflow_rt.runtime.session import check_backend

    check_backend(backend, device)
    need_extra("train", "torch", "onnx", "onnxscript")
    from hflow_rt.assets import pretrained
    from hflow_rt.export.bundle import check_bundle

    bundle = locate_bundle(model, quiet=json)
    pictures = _pictures(images, bundle.manifest.resolution)
    with status(quiet=json) as progress:
        # what was installed is not ours to write to
        report = check_bundle(bundle, pictures, backend, device, progress, keep=bundle.path != pretrained())
    if json:
        print_json(report)
    else:
        print(f"{bundle.path} on {report['backend']}")
        _print_report(report)
        say_next(f"hflow-rt sample{named(model)}")
    _fail_on(report)


def _pictures(paths: list[Path] | None, resolution: int) -> Any:
    """Images to prove engines on: the given ones, or bundled ones enlarged where the model is larger than they are."""
    import numpy as np

    from hflow_rt.assets import demo_images

    count = _IMAGES if resolution <= 64 else _LARGE_IMAGES
    if paths:
        return read_pictures(paths, resolution, count)[1]
    native = min(resolution, 64)
    pixels = read_pictures([demo_images()], native)[1]
    chosen = pixels[:: max(1, len(pixels) // count)][:count]
    return np.ascontiguousarray(chosen.repeat(resolution // native, 2).repeat(resolution // native, 3))


def _print_report(report: dict[str, Any]) -> None:
    print("largest error against float64            engine    torch fp32    allowed")
    for graph, cases in report["graphs"].items():
        for name in cases[0]["outputs"]:
            worst = max(
                (case["outputs"][name] for case in cases), key=lambda entry: entry["max"] / max(entry["bound"], 1e-30)
            )
            columns = f"{worst['max']:10.2e} {worst['torch_float32_max']:13.2e} {worst['bound']:10.2e}"
            print(
                f"  {graph + ' ' + name:34s} {columns}"
                + (f"   {worst['psnr_db']:.0f} dB" if "psnr_db" in worst else "")
            )
        differences = [case["bits_per_dim_difference"] for case in cases if "bits_per_dim_difference" in case]
        if differences:
            print(f"  {graph + ' bits/dim':34s} {max(differences):10.2e}")
    print(f"  ({report['images']} images)")
    for trip in report.get("round_trip", [])[:2]:
        if trip["path"] == "image":
            differs = f"max {trip['max']:.2e}, {trip['uint8_differs']:.2%} of 8-bit values differ"
            print(f"  image -> latents -> image, batch {trip['batch']}: {differs}")
    print("verified: the engines are the model" if report["passed"] else "NOT VERIFIED")


def _fail_on(report: dict[str, Any]) -> None:
    from hflow_rt.errors import ParityError

    if not report["passed"]:
        shown = "; ".join(report["failures"][:3])
        raise ParityError(f"the engines differ from the reference, the bundle is marked unverified: {shown}")
