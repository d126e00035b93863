"""`hflow-rt export` and `hflow-rt check`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hflow_rt.choices import Precision, Routes, Tuning
from hflow_rt.cli.app import app
from hflow_rt.cli.graphs import export_graphs, print_report
from hflow_rt.cli.opening import locate, locate_bundle, named
from hflow_rt.cli.options import (
    BackendOption,
    CudaGraphOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    RegionOption,
    ResolutionOption,
)
from hflow_rt.cli.terminal import note, print_json, say, say_next, status
from hflow_rt.extras import need_extra
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from hflow_rt.export.making import GraphOptions

_TRT = "TensorRT"  # heading in the help


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
        typer.Argument(
            metavar="RUN", help="A run, a bundle or a model file; by default the latest run.", show_default=False
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="What to build: onnx, trt for TensorRT engines beside it, or triton-repo: the bundle as models of"
            " NVIDIA's Triton Inference Server."
        ),
    ] = "onnx",
    route: Annotated[
        Routes | None,
        typer.Option(
            "--route",
            "--direction",
            help="forward is latents to image, inverse image to latents; both.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="The bundle's folder, by default RUN/bundle; of triton-repo the repository's, ./model_repository.",
            show_default=False,
        ),
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
        Precision | None,
        typer.Option(
            help="Of the arithmetic: mixed computes the nets in float16, the flow in float32; fp32.",
            show_default=False,
        ),
    ] = None,
    tune: Annotated[
        Tuning | None,
        typer.Option(
            help="cpu takes whatever form of each layer this machine runs fastest, by measurement; any is the default.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="std=S,steps=N",
            help="Move statistics of norms to those of samples at this std, of a model that has any; none for no more.",
            show_default=False,
        ),
    ] = None,
    resolution: ResolutionOption = None,
    region: RegionOption = None,
    flavor: Annotated[
        Literal["tensorrt", "rtx"] | None,
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
    serve: Annotated[
        Literal["onnx", "trt"],
        typer.Option(help="Of triton-repo: what the server runs, graphs or the bundle's TensorRT engines."),
    ] = "onnx",
    json: JsonOption = False,
) -> None:
    """Write the engines of a trained model and prove that they are that model.

    Options that are omitted stay as in the bundle that is replaced: --route, --bound, --std, --half, --precision,
    --tune, --calibrate, --resolution, --region. With either of the last two the bundle has a folder of its own, beside
    RUN/bundle.

    Example: hflow-rt export --engine trt --compute-capability 8.9
    """
    from hflow_rt.export.making import EngineOptions, GraphOptions, check_engine, fail_on, model_and_bundle

    graphs = GraphOptions(images, route, bound, std, half, precision, tune, calibrate, resolution, region)
    options = EngineOptions(flavor, capabilities, batch, workspace, refit, update_weights)
    check_engine(engine, options)
    if engine == "triton-repo":
        _export_repository(run, output, graphs, serve, json)
        return
    if engine == "trt":
        from hflow_rt.cli.engines import make_engines

        make_engines(run, output, graphs, options, json)
        return
    source, folder = model_and_bundle(None if run is None else locate(run, quiet=json), output, graphs)
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
        plain = run is None and output is None and resolution is None and region is None
        say_next("hflow-rt sample" if plain else f"hflow-rt sample {quoted(folder)}")
    fail_on(report)


def _export_repository(
    run: Path | None, output: Path | None, graphs: "GraphOptions", serve: Literal["onnx", "trt"], json: bool
) -> None:
    from hflow_rt.export.making import repository_of

    folder, versions = repository_of(run, output, graphs, serve)
    if json:
        print_json({"repository": str(folder), "models": versions})
        return
    for name, version in versions.items():
        say(f"{folder / name}: version {version}")
    say_next(f"hflow-rt serve --repository {quoted(folder)}")


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
    from hflow_rt.runtime.backends import check_backend

    check_backend(backend, device)
    need_extra("train", "torch", "onnx", "onnxscript")
    from hflow_rt.export.making import checked, fail_on

    bundle = locate_bundle(model, quiet=json)
    with status(quiet=json) as progress:
        report = checked(bundle, images, backend, device, cuda_graph, progress, note)
    if json:
        print_json(report)
    else:
        say(f"{bundle.path} on {report['backend']}")
        print_report(report)
        say_next(f"hflow-rt sample{named(model)}{' --backend trt' if backend == 'trt' else ''}")
    fail_on(report)
