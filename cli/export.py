"""`hflow-rt export` and `hflow-rt check`."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import (
    BackendOption,
    CudaGraphOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    locate_bundle,
    named,
    need_extra,
    read_pictures,
    warn_if_busy,
)
from hflow_rt.cli.terminal import note, print_json, say, say_next, status
from hflow_rt.files import is_file
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from hflow_rt.manifest import Manifest

__all__ = ["GraphOptions", "export_graphs", "fail_on", "model_and_bundle", "print_report", "proof_pictures"]

_ENGINES = ("onnx", "trt")
_TRT = "TensorRT"  # heading in the help
# Images for the proof: in float64, 256x256 takes seconds each.
_IMAGES, _LARGE_IMAGES = 8, 3


class _Direction(StrEnum):
    forward = "forward"
    inverse = "inverse"
    both = "both"


class _Flavor(StrEnum):
    tensorrt = "tensorrt"
    rtx = "rtx"


class _Precision(StrEnum):
    fp32 = "fp32"
    mixed = "mixed"


class _Tuning(StrEnum):
    any = "any"
    cpu = "cpu"


_ImagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--images",
        help="Images to prove the engines on (the first 8, or 3 above 64x64); else bundled ones.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class GraphOptions:
    """What `export` was asked for of the graphs; None where nothing was asked."""

    images: list[Path] | None = None
    direction: Literal["forward", "inverse", "both"] | None = None
    bound: bool | None = None
    std: list[str] | None = None
    half: bool | None = None
    precision: Literal["fp32", "mixed"] | None = None
    tune: Literal["any", "cpu"] | None = None

    def filled(self, there: "Manifest | None") -> "GraphOptions":
        """With all that was not told as it is in the bundle that is there, else by default."""
        from hflow_rt.manifest import HALF, STD

        known = GraphOptions(None, "both", False, list(STD), False, "fp32", "any")
        if there is not None:
            both = {"forward", "inverse"} <= there.graphs.keys()
            known = GraphOptions(
                direction="both" if both else "forward" if "forward" in there.graphs else "inverse",
                bound="bound" in there.graphs,
                std=list(there.std),
                half=there.checkpoint.get("weights") == HALF,
                precision=there.precision,
                tune=there.tuning,
            )
        told = {name: value for name, value in vars(self).items() if value is not None}
        return replace(known, **told)


@app.command()
def export(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="A run, a bundle or a model file; by default the latest run.", show_default=False
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="What to build: onnx, or trt for TensorRT engines beside it.")] = "onnx",
    direction: Annotated[
        _Direction | None,
        typer.Option(help="forward is latents to image, inverse image to latents; both.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The bundle's folder; by default RUN/bundle.", show_default=False),
    ] = None,
    images: _ImagesOption = None,
    bound: Annotated[
        bool | None,
        typer.Option(
            "--bound/--no-bound",
            help="Also the engine of 'eval bpd', which measures bits per dimension.",
            show_default=False,
        ),
    ] = None,
    std: Annotated[
        list[str] | None,
        typer.Option("--std", metavar="S|NAME=S", help="What to draw samples at by default; 0.7.", show_default=False),
    ] = None,
    half: Annotated[
        bool | None,
        typer.Option(
            "--half/--no-half",
            help="Round the weights to half precision first; arithmetic stays float32.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        _Precision | None,
        typer.Option(
            help="Of the arithmetic: mixed computes the nets in float16, the flow in float32; fp32.",
            show_default=False,
        ),
    ] = None,
    tune: Annotated[
        _Tuning | None,
        typer.Option(
            help="cpu takes whatever form of each layer this machine runs fastest, by measurement; any is the default.",
            show_default=False,
        ),
    ] = None,
    flavor: Annotated[
        _Flavor | None,
        typer.Option(
            help="TensorRT, or TensorRT for RTX, which needs no GPU to build; else what is installed.",
            show_default=False,
            rich_help_panel=_TRT,
        ),
    ] = None,
    capabilities: Annotated[
        str | None,
        typer.Option(
            "--compute-capability",
            metavar="8.6,8.9,12.0",
            help="GPUs to build for; else the one here, or without one all since 8.0.",
            show_default=False,
            rich_help_panel=_TRT,
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Images per call, or one number for just that; 1:16:64.",
            show_default=False,
            rich_help_panel=_TRT,
        ),
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="MIB",
            help="Most temporary GPU memory a layer may take.",
            show_default=False,
            rich_help_panel=_TRT,
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Build engines whose weights can be replaced; needs a GPU.", rich_help_panel=_TRT),
    ] = False,
    update_weights: Annotated[
        bool,
        typer.Option(
            "--update-weights",
            help="Give the bundle's engines, built with --refit, the weights of RUN without building; needs a GPU.",
            rich_help_panel=_TRT,
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write the engines of a trained model and prove that they are that model.

    Options that are omitted stay as in the bundle that is replaced: --direction, --bound, --std, --half, --precision,
    --tune.

    Example: hflow-rt export --engine trt --compute-capability 8.9
    """
    from hflow_rt.errors import BackendUnavailable, ConfigError

    if engine not in _ENGINES:
        raise BackendUnavailable(f"this version builds no '{engine}' engines; known: {', '.join(_ENGINES)}")
    graphs = GraphOptions(
        images,
        None if direction is None else direction.value,
        bound,
        std,
        half,
        None if precision is None else precision.value,
        None if tune is None else tune.value,
    )
    if engine == "trt":
        from hflow_rt.cli.engines import EngineOptions, build_engines, update_engines

        act = update_engines if update_weights else build_engines
        options = EngineOptions(None if flavor is None else flavor.value, capabilities, batch, workspace, refit)
        act(run, output, graphs, options, json)
        return
    if flavor or capabilities or batch or workspace or refit or update_weights:
        raise ConfigError(
            "--flavor, --compute-capability, --batch, --workspace, --refit and --update-weights are for --engine trt;"
            " add it"
        )
    source, folder = model_and_bundle(run, output)
    manifest = export_graphs(source, folder, graphs, json)
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
        say_next("hflow-rt sample" if run is None else f"hflow-rt sample {quoted(folder)}")
    fail_on(report)


@app.command()
def check(
    model: ModelArgument = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    images: _ImagesOption = None,
    cuda_graph: CudaGraphOption = None,
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
    pictures = proof_pictures(images, bundle.manifest.resolution)
    keep = bundle.path != pretrained()  # what was installed is not ours to write to
    with status(quiet=json) as progress:
        report = check_bundle(bundle, pictures, backend, device, progress, keep=keep, cuda_graph=cuda_graph)
    if json:
        print_json(report)
    else:
        say(f"{bundle.path} on {report['backend']}")
        print_report(report)
        say_next(f"hflow-rt sample{named(model)}{' --backend trt' if backend == 'trt' else ''}")
    fail_on(report)


def model_and_bundle(run: Path | None, output: Path | None) -> tuple[Path, Path]:
    """The model file of a run, a bundle or a path to one, the latest run's if none, and the folder of its bundle.

    Raises `CheckpointError` where there is none, and `BundleError` for the bundled model's bundle.
    """
    from hflow_rt.assets import pretrained
    from hflow_rt.errors import BundleError
    from hflow_rt.manifest import MANIFEST, MODEL
    from hflow_rt.runs import resolve_run
    from hflow_rt.runtime.bundle import BUNDLE

    source = run if run is not None and is_file(run) else resolve_run(run) / MODEL
    inside = source.name == MODEL and is_file(source.parent / MANIFEST)
    folder = output or (source.parent if inside else source.parent / BUNDLE)
    if folder.resolve() == pretrained().resolve():
        raise BundleError(f"{folder} was installed and must stay as it is; say where the engines go with --out")
    return source, folder


def export_graphs(source: Path, folder: Path, options: GraphOptions, quiet: bool) -> "Manifest":
    """Write the graphs of the model file `source`, prove them, and say so unless quiet.

    What `options` leave open is as in the bundle that is replaced, if that is of the same kind of model.
    """
    need_extra("train", "torch", "onnx", "onnxscript")
    from hflow_rt.errors import BundleError, ConfigError
    from hflow_rt.export.bundle import export_bundle
    from hflow_rt.manifest import HALF, read_manifest
    from hflow_rt.models.checkpoint import parse_config, read_metadata
    from hflow_rt.models.family import family

    metadata = read_metadata(source)
    config: Any = parse_config(family(metadata["family"]).config, metadata["config"])
    try:
        there = read_manifest(folder)
    except BundleError:
        there = None  # nothing, or too broken to be asked
    alike = there is not None and (there.family, there.config) == (metadata["family"], metadata["config"])
    wanted = options.filled(there if alike else None)
    if options.half is False and metadata.get("weights") == HALF:
        raise ConfigError(f"{source} was rounded to half precision; with --no-half export the run it was made from")
    if not quiet and wanted != options.filled(None):
        note(f"{folder} is exported again as it was:{_as_options(wanted)}")
    pictures = proof_pictures(options.images, config.resolution)
    assert wanted.direction is not None
    if wanted.tune == "cpu":
        warn_if_busy(quiet)
    with status(quiet=quiet) as progress:
        manifest = export_bundle(
            source,
            folder,
            pictures,
            wanted.direction,
            progress,
            bound=bool(wanted.bound),
            half=bool(wanted.half),
            std=wanted.std or (),
            precision=wanted.precision or "fp32",
            tuning=wanted.tune or "any",
        )
    if there is not None and (gone := [key for key in there.engines if key not in manifest.engines]):
        note(f"gone with the graphs they were built from: TensorRT engines {', '.join(gone)}")
    assert manifest.parity is not None
    if not quiet:
        for graph in manifest.graphs.values():
            size = manifest.files[graph.file].bytes / 1e6
            say(f"{folder / graph.file}: {sum(graph.operators.values())} nodes, {size:.1f} MB")
        for name in sorted({graph.weights for graph in manifest.graphs.values() if graph.weights}):
            say(f"{folder / name}: their constants, {manifest.files[name].bytes / 1e6:.1f} MB")
        print_report(manifest.parity)
    return manifest


def _as_options(wanted: GraphOptions) -> str:
    """What differs from the defaults, as it would be typed."""
    words = ""
    for name, default in vars(GraphOptions().filled(None)).items():
        value = getattr(wanted, name)
        if name != "images" and value != default:
            for one in value if isinstance(value, list) else [value]:
                words += f" --{name}" if one is True else f" --{name} {one}"
    return words


def proof_pictures(paths: list[Path] | None, resolution: int) -> Any:
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


def print_report(report: dict[str, Any]) -> None:
    """The parity report as a table: by output, each statistic of its error and how much of the tolerance it takes."""
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
    say("verified: the engines are the model" if report["passed"] else "NOT VERIFIED")


def _of_tolerance(error: float, tolerance: float | None) -> str:
    """For example `1.2e-07   24%`, without a share where nothing is judged."""
    share = 0.0 if tolerance is None else error / max(tolerance, 1e-30)
    shown = "" if tolerance is None else f"{share:.0%}" if share < 10 else ">999%"
    return f"{error:.1e} {shown:>5s}"


def fail_on(report: dict[str, Any]) -> None:
    """Raise `ParityError` for a report that did not pass."""
    from hflow_rt.errors import ParityError

    if not report["passed"]:
        shown = "; ".join(report["failures"][:3])
        raise ParityError(f"the engines differ from the reference, the bundle is marked unverified: {shown}")
