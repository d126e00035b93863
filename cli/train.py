"""`hflow-rt train`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.opening import locate
from hflow_rt.cli.options import JsonOption
from hflow_rt.cli.terminal import note, print_json, say, say_next
from hflow_rt.extras import need_extra
from hflow_rt.files import removed_if_empty
from hflow_rt.names import image_size, quoted

if TYPE_CHECKING:
    from hflow_rt.evaluation.figures import Evaluation
    from hflow_rt.training.config import RunConfig
    from hflow_rt.training.log import Progress
    from hflow_rt.training.trainer import TrainResult

_LOOKED_AT = {"held-out": "held-out images", "samples": "samples"}


@app.command()
def train(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="With --resume: a run, or one of its checkpoints.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Named settings that 'info --presets' lists; by default a small model's.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Settings as .json or .toml, e.g. the run.json of a run.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change one setting. Repeatable.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder, archive or array of images; by default the bundled ones.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder; by default runs/PRESET-DATE-TIME.", show_default=False),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Start from the weights of a run, a bundle or a model file, and a run's settings if none are given.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with RUN, or the latest run.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop after this many minutes.", show_default=False)] = None,
    images: Annotated[int | None, typer.Option(help="Stop after this many images in all.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for the best that works.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Train a model, by default the small one on the bundled images; Ctrl-C saves.

    Example: hflow-rt train --data photos.zip --minutes 60

    Several GPUs: accelerate launch -m hflow_rt.cli train --data photos.npy
    """
    need_extra("train", "torch", "accelerate", "tensorboard")
    from hflow_rt.errors import ConfigError
    from hflow_rt.runtime.training import samples, samples_into
    from hflow_rt.training.prepare import is_main, prepare

    for value, name in ((minutes, "--minutes"), (images, "--images")):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} must be > 0 and finite; found {value}")
    if run is not None and not resume:
        raise ConfigError(f"a run is named only with --resume; found '{run}'; name a new run's folder with --out")
    if start is not None:
        start = locate(start, quiet=not is_main())
    going_on = (run or True) if resume else False
    training = prepare(preset, data, out, config=config, settings=settings or (), start=start, resume=going_on)
    if is_main():
        for line in (training.unused, training.images.split_by):
            if line is not None:
                note(line)
        if training.other_split is not None:
            note(f"warning: {training.other_split}")
    with removed_if_empty(training.folder), _live(training.config, training.folder) as on_progress:
        on_samples = samples_into(training.folder)
        result = training.train(
            minutes=minutes,
            images=images,
            device=device,
            on_samples=on_samples,
            draw=samples,
            on_progress=on_progress,
        )
    _finish(result, json)


@contextmanager
def _live(config: RunConfig, folder: Path) -> Iterator[Callable[[Progress], None]]:
    """A line that keeps up with the training on a terminal; when piped, a line at each evaluation."""
    from hflow_rt.training.prepare import is_main

    if not is_main():
        yield lambda progress: None
        return
    note(f"training {config.preset or config.family} at {image_size(config.resolution, config.channels)} into {folder}")
    if not sys.stderr.isatty():

        def say_all(progress: Progress) -> None:
            if progress.evaluation is not None:
                note(_line(progress))
            if progress.warning is not None:
                note(f"warning: {progress.warning}")

        yield say_all
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(24), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        started = time.monotonic()
        last: list[Evaluation] = []

        def show(progress: Progress) -> None:
            if progress.evaluation is not None:
                last[:] = [progress.evaluation]
            passed = time.monotonic() - started
            whole = None if progress.seconds_left is None else passed + progress.seconds_left
            bar.update(task, completed=passed, total=whole, description=_line(progress, *last))
            if progress.evaluation is not None:
                bar.console.print(_line(progress), highlight=False)
            if progress.warning is not None:
                bar.console.print(f"warning: {progress.warning}", highlight=False, markup=False)

        yield show


def _line(progress: Progress, last: Evaluation | None = None) -> str:
    """What is known now; between evaluations a figure of the last one, where training itself has none of its kind."""
    parts = [f"{progress.images:,} images"]
    if progress.images_per_second:
        parts.append(f"{progress.images_per_second:.1f} images/s")
    found = progress.evaluation
    if found is not None and (found.figures or found.reasons):
        parts.append(f"{found.of} {_figures(found)}")
    elif not math.isnan(progress.bits_per_dim):
        parts.append(f"{progress.bits_per_dim:.3f} bits/dim (train)")
    elif not math.isnan(progress.loss):
        parts.append(f"loss {progress.loss:.4g}")
        if last is not None and last.quoted is not None:
            parts.append(f"{last.of} {_figures(replace(last, figures={'': last.quoted}))} at {last.images:,}")
    if progress.seconds_left is not None:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


def _figures(found: Evaluation) -> str:
    """All figures, the first with its standard error, and why others are not there."""
    parts: list[str] = []
    unit = ""
    for title, estimate, of in found.figures.values():
        error = "" if parts or math.isnan(estimate.standard_error) else f" ± {estimate.standard_error:.3f}"
        number = f"{estimate.mean:.3f}" if of else f"{estimate.mean:.4g}"
        parts.append(f"{'' if of in (unit, '') else f'{of} '}{number}{error} {title}")
        unit = of
    return ", ".join([*parts, *(f"{name}: none, because {reason}" for name, reason in found.reasons.items())])


def _evaluated(result: TrainResult) -> list[str]:
    """What was found at both ends, or in one line why nothing was."""
    last = result.final or result.initial
    if last is not None and last.reason is not None and not last.figures:
        return [f"nothing was measured: {last.reason}"]
    lines = [] if last is None or last.quoted is None else [f"on {last.quoted.estimate.n} {_LOOKED_AT[last.of]}:"]
    for when, found in (("at initialisation", result.initial), ("now", result.final)):
        if found is not None and (when != "now" or found.images):
            at = f" (at {found.images:,} images)" if when == "now" and found.images != result.images else ""
            lines.append(f"  {when}{at}: {_figures(found)}")
    return lines


def _finish(result: TrainResult, json: bool) -> None:
    """Say what came out and what is useful now; exits 130 after Ctrl-C."""
    from hflow_rt.training.prepare import is_main

    interrupted = result.stopped_by == "interrupt"
    if is_main() and json:
        print_json(
            {
                "run": str(result.run),
                "stopped_by": result.stopped_by,
                "step": result.step,
                "images": result.images,
                "seconds": result.seconds,
                "images_per_second": result.images_per_second,
                "initial": None if result.initial is None else result.initial.dump(),
                "final": None if result.final is None else result.final.dump(),
            }
        )
    elif is_main():
        steps, rate = f"{result.images:,} images in {result.step:,} steps", result.images_per_second
        say(f"{result.run}: {steps}, {rate:.1f} images/s")
        for line in _evaluated(result):
            say(line)
        if interrupted:
            say_next(f"hflow-rt train --resume {quoted(result.run)}", f"hflow-rt export {quoted(result.run)}")
        else:
            say_next(f"hflow-rt export {quoted(result.run)}")
    if interrupted:
        if is_main():
            note(f"interrupted and saved; go on with: hflow-rt train --resume {quoted(result.run)}")
        raise typer.Exit(130)
