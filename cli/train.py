"""`hflow-rt train`."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import JsonOption, need_extra
from hflow_rt.cli.terminal import note, print_json, say, say_next
from hflow_rt.files import is_file, is_folder, removed_if_empty
from hflow_rt.names import quoted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.data.dataset import ImageSet
    from hflow_rt.evaluation.bits import Evaluation
    from hflow_rt.models.family import LatentModel
    from hflow_rt.training.config import RunConfig
    from hflow_rt.training.log import Progress
    from hflow_rt.training.trainer import TrainResult

# The std of each row of the sample grid: the whole prior, then the range where samples look best.
_STDS = (1.0, 0.8, 0.64, 0.4, 0.24)
_SAMPLES_A_ROW = 8


@app.command()
def train(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="With --resume: a run, or one of its checkpoints.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Named settings; by default hflow-demo.", show_default=False),
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

    Example: hflow-rt train --preset hflow-64 --data photos.zip --minutes 60

    Several GPUs: accelerate launch -m hflow_rt.cli train --preset hflow-256 --data photos.npy
    """
    need_extra("train", "torch", "accelerate", "tensorboard")
    from hflow_rt.errors import ConfigError
    from hflow_rt.runs import ROOT, RUN, new_run, read_run
    from hflow_rt.training.config import load_config

    for value, name in ((minutes, "--minutes"), (images, "--images")):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} must be > 0 and finite; found {value}")
    about: dict[str, Any] = {"source": None if data is None else os.path.abspath(data)}
    before: dict[str, Any] | None = None
    checkpoint: bool | Path = False
    folder = out
    if resume:
        if preset is not None or config is not None or start is not None:
            raise ConfigError("--resume takes weights and settings from the run; change single ones with --set")
        folder, checkpoint, values = _resumed(run, out)
        chosen = load_config(file=values, overrides=settings or ())
        before = values.get("run", {}).get("data", {})
        if data is None:
            about = {"source": before.get("source")}
    else:
        if run is not None:
            raise ConfigError(f"a run is named only with --resume; found '{run}'; name a new run's folder with --out")
        if start is not None and preset is None and config is None:
            if not is_file(start / RUN):
                raise ConfigError(f"{start} holds no settings of a training run; name some with --preset or --config")
            chosen = load_config(file=read_run(start), overrides=settings or ())
        else:
            chosen = load_config(preset or ("hflow-demo" if config is None else None), config, settings or ())
    weights = None if start is None else _model_file(start)
    opened = _open(about["source"], chosen)
    about["split"] = opened.split_by
    if before is not None and _is_main():
        _warn_of_split(before.get("split"), opened)

    from hflow_rt.training.trainer import train as run_training

    if folder is None:
        name = chosen.preset or chosen.family
        folder = new_run(name) if _is_main() else ROOT / name  # the main process writes
    with removed_if_empty(folder), _live(chosen, folder) as on_progress:
        result = run_training(
            chosen,
            opened,
            folder,
            resume=checkpoint,
            weights=weights,
            minutes=minutes,
            images=images,
            device=device,
            about_data=about,
            on_samples=lambda model, seen: _draw(model, folder, seen),
            on_progress=on_progress,
        )
    _finish(result, json)


def _resumed(run: Path | None, out: Path | None) -> tuple[Path, bool | Path, dict[str, Any]]:
    """Folder, checkpoint and settings of what `--resume [RUN] [--out RUN]` names."""
    from hflow_rt.errors import ConfigError
    from hflow_rt.runs import CHECKPOINTS, latest_run, read_run

    named = run or out or latest_run()
    is_checkpoint = named.resolve().parent.name == CHECKPOINTS
    folder = named.parent.parent if is_checkpoint else named
    if out is not None and out.resolve() != folder.resolve():
        raise ConfigError(f"a run goes on in its own folder {folder}, not in --out {out}; omit --out")
    return folder, named if is_checkpoint else True, read_run(folder)


def _model_file(path: Path) -> Path:
    from hflow_rt.manifest import MODEL

    return path / MODEL if is_folder(path) else path


def _open(source: str | None, config: RunConfig) -> ImageSet:
    from hflow_rt.assets import demo_images
    from hflow_rt.data.dataset import open_dataset

    opened = open_dataset(demo_images() if source is None else Path(source), config.resolution)
    if opened.skipped and source is not None and _is_main():
        counts = ", ".join(f"{count} {reason}" for reason, count in opened.skipped.items())
        note(f"{len(opened)} images; not used: {counts}")
    if _is_main():
        note(opened.split_by)
    return opened


def _warn_of_split(before: str | None, images: ImageSet) -> None:
    """Say so if a run that goes on began with other images held out. Versions that recorded nothing split otherwise."""
    known = all(name.partition("/")[0] in ("train", "test", "val") for name in images.names)
    if before is None and not known and "by the folders" in images.split_by:
        before = "a hash of the names"
    if before not in (None, images.split_by):
        note(
            f"warning: the run began with images split by {before}, so it has seen some that are now held out; "
            "their bits/dim mean less than those of a new run"
        )


def _draw(model: LatentModel, folder: Path, images: int) -> NDArray[np.uint8]:
    """Write `samples/IMAGES.png`, a row for each std, the same noise in every picture of a run."""
    import numpy as np
    import torch

    from hflow_rt.conditions import in_turn
    from hflow_rt.runs import SAMPLES
    from hflow_rt.runtime.noise import draw_latents
    from hflow_rt.runtime.pictures import labelled_rows, save_image, to_uint8

    device = next(model.parameters()).device
    rows = []
    for std in _STDS:
        stds = dict.fromkeys(model.latent_shapes(), std)
        latents = draw_latents(model.latent_shapes(), model.prior_std(), 0, range(_SAMPLES_A_ROW), stds)
        latents |= in_turn(model.choices(), range(_SAMPLES_A_ROW))
        decoded = model.decode({name: torch.from_numpy(value).to(device) for name, value in latents.items()})
        rows.append((f"{std:g}", to_uint8(decoded.nan_to_num(0.0).float().cpu().numpy())))
    picture = labelled_rows(rows)
    save_image(folder / SAMPLES / f"{images:09d}.png", picture)
    return np.asarray(picture)


@contextmanager
def _live(config: RunConfig, folder: Path) -> Iterator[Callable[[Progress], None]]:
    """A line that keeps up with the training on a terminal; when piped, a line at each evaluation."""
    if not _is_main():
        yield lambda progress: None
        return
    note(f"training {config.preset or config.family} at {config.resolution}x{config.resolution} into {folder}")
    if not sys.stderr.isatty():
        yield (lambda progress: None if progress.evaluation is None else note(_line(progress)))
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(24), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        started = time.monotonic()

        def show(progress: Progress) -> None:
            passed = time.monotonic() - started
            whole = None if progress.seconds_left is None else passed + progress.seconds_left
            bar.update(task, completed=passed, total=whole, description=_line(progress))
            if progress.evaluation is not None:
                bar.console.print(_line(progress), highlight=False)

        yield show


def _line(progress: Progress) -> str:
    parts = [f"{progress.images:,} images"]
    if progress.images_per_second:
        parts.append(f"{progress.images_per_second:.1f} images/s")
    if progress.evaluation is not None:
        parts.append(f"held-out bits/dim {_bits(progress.evaluation)}")
    elif progress.bits_per_dim == progress.bits_per_dim:
        parts.append(f"{progress.bits_per_dim:.3f} bits/dim (train)")
    if progress.seconds_left is not None:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


def _bits(found: Evaluation) -> str:
    """The strict bound with its standard error, and the published one."""
    paper = "not finite" if found.paper is None else f"{found.paper:.3f}"
    if found.strict is None:
        return f"paper's bound {paper} (strict: {found.reason})"
    error = "" if found.strict.n < 2 else f" ± {found.strict.standard_error:.3f}"
    return f"{found.strict.mean:.3f}{error} strict, {paper} paper's bound"


def _finish(result: TrainResult, json: bool) -> None:
    """Say what came out and what is useful now; exits 130 after Ctrl-C."""
    interrupted = result.stopped_by == "interrupt"
    if _is_main() and json:
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
    elif _is_main():
        steps, rate = f"{result.images:,} images in {result.step:,} steps", result.images_per_second
        say(f"{result.run}: {steps}, {rate:.1f} images/s")
        count = 0 if result.final is None or result.final.strict is None else result.final.strict.n
        say(f"bits/dim{f' on {count} held-out images' if count else ''}:")
        for when, found in (("at initialisation", result.initial), ("now", result.final)):
            if found is not None and (when != "now" or found.images):
                at = f" (at {found.images:,} images)" if when == "now" and found.images != result.images else ""
                say(f"  {when}{at}: {_bits(found)}")
        if interrupted:
            say_next(f"hflow-rt train --resume {quoted(result.run)}", f"hflow-rt export {quoted(result.run)}")
        else:
            say_next(f"hflow-rt export {quoted(result.run)}")
    if interrupted:
        if _is_main():
            note(f"interrupted and saved; go on with: hflow-rt train --resume {quoted(result.run)}")
        raise typer.Exit(130)


def _is_main() -> bool:
    """Whether this is the process that reports, among those `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"
