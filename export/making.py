"""What exporting and checking decide: which model and folder, what stays as it was, on which images it is proved.

What is not asked for stays as in the bundle that is replaced.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hflow_rt.assets import demo_images, is_installed
from hflow_rt.choices import Routes
from hflow_rt.errors import BackendUnavailable, BundleError, ConfigError, ParityError
from hflow_rt.export.calibration import parse_calibration
from hflow_rt.extras import need_extra
from hflow_rt.files import is_file
from hflow_rt.manifest import CALIBRATED, HALF, MANIFEST, MODEL, STD, Manifest, read_manifest, routes_of
from hflow_rt.models.checkpoint import parse_config, read_metadata, seen_at
from hflow_rt.models.registry import View, family
from hflow_rt.runs import resolve_run
from hflow_rt.runtime.backends import check_backend
from hflow_rt.runtime.bundle import BUNDLE, Bundle, chosen_model, find_bundle
from hflow_rt.runtime.images.reading import read_pictures

__all__ = [
    "ENGINES",
    "EngineOptions",
    "GraphOptions",
    "Tell",
    "check_engine",
    "checked",
    "export_graphs",
    "fail_on",
    "model_and_bundle",
    "nobody",
    "proof_pictures",
    "repository_of",
    "typed_region",
    "viewed",
    "wanted_graphs",
    "went",
]

REPOSITORY = "model_repository"  # the folder of models for a server
ENGINES = ("onnx", "trt", "triton-repo")
# Images for the proof: in float64, 256x256 takes seconds each.
_IMAGES, _LARGE_IMAGES = 8, 3

Tell = Callable[[str], None]


def nobody(line: str) -> None:
    """Where nobody listens."""


@dataclass(frozen=True)
class GraphOptions:
    """What `export` was asked for of the graphs; None where nothing was asked.

    resolution, region: of the images, see `View`; region as it was typed.
    """

    images: Sequence[Path] | None = None
    route: Routes | None = None
    bound: bool | None = None
    std: Sequence[str] | None = None
    half: bool | None = None
    precision: Literal["fp32", "mixed"] | None = None
    tune: Literal["any", "cpu"] | None = None
    calibrate: str | None = None  # as `export.calibration` reads it; "none" for what training left
    resolution: int | None = None
    region: str | None = None

    def view(self, config: Any) -> View | None:
        """Of images of a model of these settings. Raises `ConfigError`."""
        if self.resolution is None and self.region is None:
            return None
        region = {} if self.region is None else {"region": self.region}
        side = config.resolution if self.resolution is None else self.resolution
        return parse_config(View, {"resolution": side, **region})

    def filled(self, there: Manifest | None) -> "GraphOptions":
        """With all that was not asked for as it is in the bundle that is there, else by default."""
        known = GraphOptions(None, "both", False, list(STD), False, "fp32", "any", "none")
        if there is not None:
            said = there.config.get("view")
            view = None if said is None else View.model_validate(said)
            whole = len(there.routes) + len(there.absent) == len(routes_of("both"))
            known = GraphOptions(
                route="both" if whole else next(iter(there.routes)),
                bound="bound" in there.graphs,
                std=list(there.std),
                half=there.checkpoint.get("weights") == HALF,
                precision=there.precision,
                tune=there.tuning,
                calibrate=there.checkpoint.get(CALIBRATED, "none"),
                resolution=None if view is None else view.resolution,
                region=None if view is None else view.typed,
            )
        asked = {name: value for name, value in vars(self).items() if value is not None}
        if self.calibrate not in (None, "none") and self.std is None:
            asked["std"] = list(parse_calibration(self.calibrate).std)  # what it is for
        return replace(known, **asked)

    def words(self) -> str:
        """What differs from the defaults, as it would be typed."""
        words = ""
        for name, default in vars(GraphOptions().filled(None)).items():
            value = getattr(self, name)
            if name != "images" and value != default:
                for one in value if isinstance(value, (list, tuple)) else [value]:
                    words += f" --{name}" if one is True else f" --{name} {one}"
        return words


def typed_region(region: Sequence[float] | str | None) -> str | None:
    """A region as `GraphOptions` has it."""
    return region if region is None or isinstance(region, str) else ",".join(f"{share:g}" for share in region)


@dataclass(frozen=True)
class EngineOptions:
    """What `export` was asked for of TensorRT, as it was typed; None where nothing was asked.

    update: give the engines that are there other weights instead of building any.
    """

    flavor: Literal["tensorrt", "rtx"] | None = None
    capabilities: str | None = None
    batch: str | None = None
    workspace: int | None = None
    refit: bool = False
    update: bool = False


def checked(
    bundle: Bundle,
    images: Sequence[Path | str] | None,
    backend: str = "onnx",
    device: str = "auto",
    cuda_graph: bool | None = None,
    progress: Tell = nobody,
    note: Tell = nobody,
) -> dict[str, Any]:
    """`check` of a bundle that was found already, with the report of one that fails as well."""
    check_backend(backend, device)
    need_extra("train", "torch", "onnx", what="checking")
    from hflow_rt.export.bundle import check_bundle

    paths = None if images is None else [Path(path) for path in images]
    pictures = proof_pictures(paths, bundle.manifest.resolution, note, bundle.manifest.channels)
    keep = not is_installed(bundle.path)
    return check_bundle(bundle, pictures, backend, device, progress, keep=keep, cuda_graph=cuda_graph)


def check_engine(engine: str, options: EngineOptions) -> None:
    """Raise `BackendUnavailable` for an engine that nobody can build, `ConfigError` for options of another one."""
    if engine not in ENGINES:
        raise BackendUnavailable(f"this version builds no '{engine}' engines; known: {', '.join(ENGINES)}")
    if engine != "trt" and options != EngineOptions():
        raise ConfigError(
            "--flavor, --compute-capability, --batch, --workspace, --refit and --update-weights are for --engine trt;"
            " add it"
        )


def repository_of(
    run: Path | None, folder: Path | None, graphs: GraphOptions, served: Literal["onnx", "trt"] = "onnx"
) -> tuple[Path, dict[str, int]]:
    """Write the bundle of a run, as it is, into a model repository; its folder, and the models' versions.

    run: by default the latest, else the bundled model. Raises as `write_repository`, and `ConfigError` for options of
    graphs, which are there already.
    """
    from hflow_rt.export.repository import write_repository

    if graphs != GraphOptions():
        raise ConfigError(
            "a model repository takes a bundle as it is; export with these options first, without --engine"
        )
    folder = Path(REPOSITORY) if folder is None else folder
    return folder, write_repository(find_bundle(chosen_model(run)[0]), folder, served)


def model_and_bundle(run: Path | None, output: Path | None, options: GraphOptions | None = None) -> tuple[Path, Path]:
    """The model file of a run, a bundle or a path to one, the latest run's if none, and the folder of its bundle.

    A view that `options` ask for has a folder beside. Raises `CheckpointError` where there is none, and `BundleError`
    for the bundled model's bundle.
    """
    source = run if run is not None and is_file(run) else resolve_run(run) / MODEL
    inside = source.name == MODEL and is_file(source.parent / MANIFEST)
    folder = output or (source.parent if inside else source.parent / BUNDLE)
    if options is not None and output is None:
        asked = (options.resolution, options.region)
        folder = folder.with_name("-".join([folder.name, *(str(part) for part in asked if part is not None)]))
    if is_installed(folder):
        raise BundleError(f"{folder} was installed and must stay as it is; say where the engines go with --out")
    return source, folder


def export_graphs(
    source: Path, folder: Path, options: GraphOptions, progress: Tell = nobody, note: Tell = nobody
) -> tuple[Manifest, list[str]]:
    """Write and prove the graphs of the model file `source`; also the TensorRT engines that went with the old ones.

    options: filled as `wanted_graphs` does. note: hears of images that cannot be used. Raises as `export_bundle`.
    """
    need_extra("train", "torch", "onnx", "onnxscript", what="exporting")
    from hflow_rt.export.bundle import export_bundle

    _check_view(source, options)
    wanted, there, config = wanted_graphs(source, folder, options)
    manifest = export_bundle(
        source,
        folder,
        proof_pictures(options.images, config.resolution, note, config.channels),
        wanted.route or "both",
        progress,
        bound=bool(wanted.bound),
        half=bool(wanted.half),
        std=wanted.std or (),
        precision=wanted.precision or "fp32",
        tuning=wanted.tune or "any",
        calibration=None if wanted.calibrate == "none" else wanted.calibrate,
        view=wanted.view(config),
    )
    gone = [] if there is None else [key for key in there.engines if key not in manifest.engines]
    return manifest, gone


def viewed(bundle: Bundle, resolution: int | None, region: str | None, progress: Tell, note: Tell = nobody) -> Bundle:
    """The bundle of the same weights with another view of images, beside it; exported where it is not there yet.

    Raises `ParityError` and as `export_graphs` does.
    """
    options = GraphOptions(resolution=resolution, region=region)
    source, folder = model_and_bundle(bundle.path, None, options)
    _check_view(source, options)
    if not (is_file(folder / MANIFEST) and find_bundle(folder).made_of(source)):
        progress(f"exporting {folder}, once")
        fail_on(export_graphs(source, folder, options, progress, note)[0].parity or {})
    return find_bundle(folder)


def _check_view(source: Path, options: GraphOptions) -> None:
    """Raise `ConfigError` for a view that the model file `source` has not."""
    metadata = read_metadata(source)
    config = parse_config(family(metadata["family"]).config, metadata["config"])
    if (view := options.view(config)) is not None:
        seen_at(config, view)


def went(engines: Sequence[str]) -> str:
    """A line about the keys of engines that `export_graphs` could not keep."""
    return f"gone with the graphs they were built from: TensorRT engines {', '.join(engines)}"


def wanted_graphs(source: Path, folder: Path, options: GraphOptions) -> tuple[GraphOptions, Manifest | None, Any]:
    """What to write of the model file `source`, the manifest that is in `folder` now, and the model's settings.

    What `options` leave open is as in the bundle that is replaced, if that is of the same kind of model.
    Raises `CheckpointError` and `ConfigError`.
    """
    metadata = read_metadata(source)
    kind = family(metadata["family"]).config
    config = parse_config(kind, metadata["config"])
    try:
        there = read_manifest(folder)
    except BundleError:
        there = None  # nothing, or too broken to be asked
    alike = False
    if there is not None and there.family == metadata["family"]:
        with contextlib.suppress(ConfigError):  # settings that this version has not
            known = parse_config(kind, there.config)  # versions before wrote fewer
            alike = known.model_copy(update={"view": None}) == config.model_copy(update={"view": None})
    if options.half is False and metadata.get("weights") == HALF:
        raise ConfigError(f"{source} was rounded to half precision; with --no-half export the run it was made from")
    if options.calibrate == "none" and CALIBRATED in metadata:
        raise ConfigError(f"{source} was calibrated at {metadata[CALIBRATED]}; export the run that it was made from")
    return options.filled(there if alike else None), there, config


def proof_pictures(
    paths: Sequence[Path] | None, resolution: int, note: Tell = nobody, channels: int = 3
) -> NDArray[np.float32]:
    """Images to prove engines on: the given ones, or bundled ones enlarged where the model is larger than they are."""
    count = _IMAGES if resolution <= 64 else _LARGE_IMAGES
    if paths:
        return read_pictures(paths, resolution, count, note=note, channels=channels)[1]
    native = min(resolution, 64)
    pixels = read_pictures([demo_images()], native, channels=channels)[1]
    chosen = pixels[:: max(1, len(pixels) // count)][:count]
    return np.ascontiguousarray(chosen.repeat(resolution // native, 2).repeat(resolution // native, 3))


def fail_on(report: dict[str, Any]) -> None:
    """Raise `ParityError` for a report that did not pass."""
    if not report["passed"]:
        shown = "; ".join(report["failures"][:3])
        raise ParityError(f"the engines differ from the reference, the bundle is marked unverified: {shown}")
