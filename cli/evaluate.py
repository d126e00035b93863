"""`hflow-rt eval bpd` and `hflow-rt eval distance`."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hflow_rt.cli.app import Commands, app
from hflow_rt.cli.opening import locate, named, open_session
from hflow_rt.cli.options import BackendOption, ControlOption, DeviceOption, JsonOption, ModelArgument, StdOption
from hflow_rt.cli.terminal import note, print_json, say, say_next, tracked
from hflow_rt.extras import need_extra
from hflow_rt.files import is_file
from hflow_rt.names import image_size

if TYPE_CHECKING:
    from hflow_rt.evaluation.batches import Track
    from hflow_rt.training.processes import Processes

evaluation = Commands(no_args_is_help=True, help="Measure a model: bits per dimension, and distances to data.")
app.add_typer(evaluation, name="eval")

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder, zip, tar or .npy of images; by default the bundled ones.", show_default=False),
]
ReportOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Also write the report (.json).", show_default=False)
]
BatchOption = Annotated[int, typer.Option(help="Images per call.")]


@evaluation.command()
def bpd(
    model: ModelArgument = None,
    data: DataOption = None,
    split: Annotated[str, typer.Option(help="test (the held-out images), train or all.")] = "test",
    limit: Annotated[
        int | None, typer.Option(help="This many images, evenly spaced, instead of all.", show_default=False)
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            "--draws",
            "--importance",
            help="Draws of noise an image, which an importance-weighted bound weights; published figures take one.",
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    batch: BatchOption = 32,
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="torch, or onnx for a bundle exported with --bound.")
    ] = "torch",
    device: DeviceOption = "auto",
    by_step: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="Also draw what each call of a model of many steps costs; runs every step of every image.",
            show_default=False,
        ),
    ] = None,
    output: ReportOption = None,
    json: JsonOption = False,
) -> None:
    """Bits per dimension by every bound that the model has, latent by latent.

    Example: hflow-rt eval bpd --data photos.zip

    Several GPUs: accelerate launch -m hflow_rt.cli eval bpd --data photos.zip
    """
    _check_report(output)
    need_extra("eval", "torch", "accelerate")
    from hflow_rt.data.selection import select
    from hflow_rt.evaluation.bits import bits_per_dim, open_reference
    from hflow_rt.evaluation.reports import about_data, bits_lines
    from hflow_rt.evaluation.steps import bits_by_step, chart
    from hflow_rt.models.checkpoint import read_metadata
    from hflow_rt.runtime.backends import check_backend
    from hflow_rt.runtime.images.pictures import check_picture_name
    from hflow_rt.training.processes import Processes

    check_backend(backend, device)
    if by_step is not None:
        check_picture_name(by_step)
    processes = Processes(device, None)
    quiet = json or not processes.is_main
    if backend == "torch":
        session, source, where = None, _weights(model, quiet), f"torch {processes.device.type}"
        weights, metadata = source, read_metadata(source)
        reference = open_reference(weights, processes.device)
        if not quiet:
            size = image_size(reference.resolution, reference.channels)
            note(f"{metadata['family']} {size} from {weights} on {where}")
    else:
        session = open_session(model, backend, device, quiet)
        source, where, weights = session.bundle.path, session.backend, session.bundle.model
        reference, metadata = open_reference(weights), read_metadata(weights)
    chosen = select(data, reference.resolution, split, limit, reference.channels)
    found = bits_per_dim(reference, chosen, seed, draws, batch, processes, _track(processes), session)
    steps = None if by_step is None else bits_by_step(reference, chosen, seed, batch, processes, _track(processes))
    report = {"model": str(source), "backend": where, **found.dump()}
    report |= {"seed": seed, "draws": draws, "batch": batch, **about_data(chosen)}
    lines = bits_lines(found, chosen, metadata, seed, draws)
    if by_step is not None and steps is not None:
        report["by_step"] = steps.dump()
        lines += [f"{line}: {by_step}" for line in steps.lines()]
        if processes.is_main:
            chart(steps, by_step)
    following = f"hflow-rt eval distance{_again(model, data)} --features efficientnet-lite0"
    _finish(processes, report, lines, output, json, following)


@evaluation.command()
def distance(
    features: Annotated[
        str,
        typer.Option(
            help="efficientnet-lite0, or a file that maps images [B, 3, R, R] to features [B, D]: .onnx, or "
            "TorchScript (.pt, .ts), whose code runs, so give only one that you trust."
        ),
    ],
    model: ModelArgument = None,
    data: DataOption = None,
    split: Annotated[str, typer.Option(help="test (the held-out images), train or all.")] = "train",
    number: Annotated[int, typer.Option("-n", "--number", help="How many samples.")] = 1000,
    std: StdOption = None,
    control: ControlOption = None,
    path: Annotated[
        int | None,
        typer.Option(
            metavar="PAIRS",
            help="Also the perceptual path length, over so many pairs of samples: how unevenly images change.",
            show_default=False,
        ),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Refuse a bundle that was not calibrated for samples of this std.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the samples, and of the subsets of the kernel distance.")] = 0,
    takes: Annotated[
        str | None,
        typer.Option(
            "--feature-input",
            metavar="uint8|float",
            help="What a TorchScript file takes: uint8, the default, or float in [0, 1].",
            show_default=False,
        ),
    ] = None,
    batch: BatchOption = 32,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where features of data are kept; else in the user's cache.", show_default=False),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor keep features of data.")] = False,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    output: ReportOption = None,
    json: JsonOption = False,
) -> None:
    """Fréchet and kernel distance between samples and data, precision and recall, in the features of a network.

    Example: hflow-rt eval distance --data photos.zip --features efficientnet-lite0 -n 1000

    They are called FID and KID only in features of a file whose name starts with "inception" and that gives 2048.

    Several GPUs: accelerate launch -m hflow_rt.cli eval distance --features efficientnet-lite0
    """
    from hflow_rt.errors import ConfigError

    _check_report(output)
    if cache is not None and no_cache:
        raise ConfigError("--cache and --no-cache exclude each other; give one")
    need_extra("eval", "torch", "accelerate", "torchmetrics")
    from hflow_rt.data.selection import select
    from hflow_rt.evaluation.cache import FeatureCache, cache_folder
    from hflow_rt.evaluation.distance import distances
    from hflow_rt.evaluation.features import open_features
    from hflow_rt.evaluation.path_length import STEP, path_length
    from hflow_rt.evaluation.perception import perception
    from hflow_rt.evaluation.reports import about_data, distance_lines, path_line
    from hflow_rt.export.calibration import check_calibrated
    from hflow_rt.runtime.backends import check_backend
    from hflow_rt.runtime.latents.latent_views import space_of_slots, stepped
    from hflow_rt.runtime.noise import parse_controls
    from hflow_rt.runtime.session import LATENT_SPACE
    from hflow_rt.training.processes import Processes

    check_backend(backend, device)
    processes = Processes(device, None)
    session = open_session(model, backend, device, quiet=json or not processes.is_main)
    stds = std or session.std
    if calibrated:
        check_calibrated(session.calibrated, stds)
    network = open_features(features, session.resolution, processes.device, takes)
    seen = None if path is None else perception(features, session.resolution, processes.device, takes)
    chosen = select(data, session.resolution, split, channels=session.channels)
    kept = None if no_cache else FeatureCache(cache or cache_folder())
    controls = parse_controls(control or [])
    settings = stds, seed, batch, kept, processes, _track(processes), controls, chosen.held_out
    found = distances(network, session, chosen, number, *settings)
    length = None
    if path is not None and seen is not None:
        shown = partial(stepped, session, share=STEP, std=stds, seed=seed, controls=controls)
        sharing = batch, processes, _track(processes)
        space = space_of_slots(session) or LATENT_SPACE
        length = path_length(shown, space, seen, processes.device, path, *sharing)
    report: dict[str, Any] = {
        "model": str(session.bundle.path),
        "backend": session.backend,
        **({} if found is None else found.dump()),
        **({} if length is None else {"path_length": length.dump()}),
        "std": stds,
        **({} if session.calibrated is None else {"calibrated": session.calibrated}),
        **({"controls": controls} if controls else {}),
        "seed": seed,
        **about_data(chosen),
    }
    drawn = [*([f"std {' '.join(stds)}"] if stds else []), *(control or [])]
    lines = [] if found is None else distance_lines(found, chosen, drawn, seed)
    lines += [] if length is None else [path_line(length, network.name)]
    _finish(processes, report, lines, output, json, f"hflow-rt eval bpd{_again(model, data)}")


def _check_report(output: Path | None) -> None:
    from hflow_rt.errors import DataError

    if output is not None and output.suffix.lower() != ".json":
        raise DataError(f"a report's name must end in .json; found '{output.name}'; rename it")


def _weights(model: Path | None, quiet: bool) -> Path:
    """The model file of a run, a bundle or itself."""
    from hflow_rt.manifest import MANIFEST, MODEL, read_manifest
    from hflow_rt.runs import resolve_run
    from hflow_rt.runtime.bundle import Bundle

    found = locate(model, quiet)
    if is_file(found / MANIFEST):
        return Bundle(found, read_manifest(found)).model
    return found if is_file(found) else resolve_run(found) / MODEL


def _again(model: Path | None, data: Path | None) -> str:
    return named(model) + named(data, "--data ")


def _track(processes: "Processes") -> "Track":
    """A bar for the batches of the main process, which stand for everyone's."""

    def track(label: str, parts: Sequence[range]) -> Iterable[range]:
        if not processes.is_main:
            return parts
        return tracked(parts, sum(map(len, parts)), len, label)

    return track


def _finish(
    processes: "Processes", report: dict[str, Any], lines: list[str], output: Path | None, json: bool, following: str
) -> None:
    """Write and print, by the main process, when all are done."""
    import json as serializer

    from hflow_rt.files import atomic_file

    processes.wait()
    processes.close()
    if not processes.is_main:
        return
    if output is not None:
        with atomic_file(output) as temporary:
            temporary.write_text(serializer.dumps(report, indent=1) + "\n")
    if json:
        print_json(report)
        return
    for line in lines:
        say(line)
    if output is not None:
        say(f"report: {output}")
    say_next(following)
