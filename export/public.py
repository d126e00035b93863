"""`hflow_rt.export` and `hflow_rt.check`: what the commands do, by one call."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hflow_rt.assets import pretrained
from hflow_rt.choices import Routes
from hflow_rt.export.making import (
    EngineOptions,
    GraphOptions,
    Tell,
    check_engine,
    checked,
    export_graphs,
    fail_on,
    model_and_bundle,
    nobody,
    repository_of,
    typed_region,
    went,
)
from hflow_rt.runtime.bundle import find_bundle

__all__ = ["check", "export"]


@contextmanager
def _heard() -> Iterator[Tell]:
    """Lines that become warnings of who called the public function."""
    lines: list[str] = []
    try:
        yield lines.append
    finally:
        for line in lines:
            warnings.warn(line, stacklevel=4)  # of the function, behind what closes this context


def export(
    run: Path | str | None = None,
    engine: str = "onnx",
    out: Path | str | None = None,
    *,
    images: Sequence[Path | str] | None = None,
    route: Routes | None = None,
    bound: bool | None = None,
    std: Sequence[str] | None = None,
    half: bool | None = None,
    precision: Literal["fp32", "mixed"] | None = None,
    tune: Literal["any", "cpu"] | None = None,
    calibrate: str | None = None,
    resolution: int | None = None,
    region: Sequence[float] | None = None,
    flavor: Literal["tensorrt", "rtx"] | None = None,
    capabilities: str | None = None,
    batch: str | None = None,
    workspace: int | None = None,
    refit: bool = False,
    update_weights: bool = False,
    serve: Literal["onnx", "trt"] = "onnx",
    progress: Callable[[str], None] = nobody,
) -> Path:
    """Write the engines of a trained model, prove that they are that model, and return the bundle's folder.

    run: a run, a bundle or a model file; by default the latest run. engine: `onnx`, or `trt` for TensorRT engines
    beside it, for the GPU that is here. out: by default RUN/bundle. images: to prove the engines on (the first 8, or 3
    above 64x64); by default bundled ones. resolution, region: as of `load`; then out is by default a folder beside
    RUN/bundle. Everything else is as of `hflow-rt export` and, where it is None, as in the bundle that is replaced;
    `flavor` and what follows are for TensorRT. With `triton-repo` the bundle as it is becomes a model repository of
    NVIDIA's Triton Inference Server, by default ./model_repository, whose folder is returned; serve: what its models
    run, see `write_repository`. progress: hears of each step. Raises `ParityError` for engines that are
    not the model, and `CheckpointError`, `BundleError`, `ConfigError`, `DataError`, `BackendUnavailable`; warns of
    images that cannot be used and of TensorRT engines that went with the graphs they were built from.

    >>> import hflow_rt
    >>> hflow_rt.export("runs/my-run", route="forward").as_posix()
    'runs/my-run/bundle'
    """
    engines = EngineOptions(flavor, capabilities, batch, workspace, refit, update_weights)
    check_engine(engine, engines)
    paths = None if images is None else [Path(path) for path in images]
    options = GraphOptions(paths, route, bound, std, half, precision, tune, calibrate, resolution, typed_region(region))
    run, out = (None if path is None else Path(path) for path in (run, out))

    with _heard() as warn:

        def make(source: Path, folder: Path, options: GraphOptions) -> None:
            manifest, gone = export_graphs(source, folder, options, progress, warn)
            if gone:
                warn(went(gone))
            fail_on(manifest.parity or {})

        if engine == "triton-repo":
            return repository_of(run, out, options, serve)[0]
        if engine == "trt":
            from hflow_rt.export.tensorrt_bundle import add_plans

            made = add_plans(run, out, options, engines, make, progress, warn)
            if made.report is not None:
                fail_on(made.report)
            return made.bundle.path
        source, folder = model_and_bundle(run, out, options)
        make(source, folder, options)
        return folder


def check(
    model: Path | str | None = None,
    backend: str = "onnx",
    device: str = "auto",
    *,
    images: Sequence[Path | str] | None = None,
    cuda_graph: bool | None = None,
    progress: Callable[[str], None] = nobody,
) -> dict[str, Any]:
    """Compare every engine of a bundle, or of an exported run, with the torch reference in float64; the report.

    model: by default the bundled one. images: as of `export`. The report stays in the bundle. Raises `ParityError`
    where an engine differs, and `BundleError`, `BackendUnavailable` and `DataError`; warns as `load` and `export` do.

    >>> import hflow_rt
    >>> hflow_rt.check("runs/my-run")["passed"]
    True
    """
    bundle = find_bundle(pretrained() if model is None else model)
    with _heard() as warn:
        if bundle.outdated is not None:
            warn(bundle.outdated)
        report = checked(bundle, images, backend, device, cuda_graph, progress, warn)
    fail_on(report)
    return report
