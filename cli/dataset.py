"""`hflow-rt dataset`: turn a folder, zip or tar of images into one training file."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.terminal import print_json, say, say_next
from hflow_rt.names import image_size, quoted

if TYPE_CHECKING:
    from hflow_rt.data.dataset import Progress


@app.command()
def dataset(
    source: Annotated[Path, typer.Argument(help="Folder, zip or tar of images, .parquet, or a .npy or .npz array.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, ending in .npy.")],
    resolution: Annotated[int, typer.Option(min=1, help="Side of the square images in pixels.")],
    crop: Annotated[
        Literal["center", "none"], typer.Option(help="What happens to oblong images; none skips them.")
    ] = "center",
    channels: Annotated[int, typer.Option(help="3, or 1 for a grey model, which sees the luminance.")] = 3,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the first unusable file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Turn a folder, zip, tar or array of images into one file to train on.

    Anything that Pillow reads: transparency becomes white, grey becomes RGB, or with --channels 1 colours grey; colour
    profiles become sRGB, EXIF orientation is obeyed. Files that are no images, are broken or smaller than the
    resolution are skipped and counted.
    Arrays are uint8, [N, H, W, 3], [N, 3, H, W] or grey [N, H, W].

    Example: hflow-rt dataset photos.zip -o photos-128.npy --resolution 128
    """
    from hflow_rt.data.dataset import build_dataset
    from hflow_rt.data.splits import split_names

    with _progress_bar() as progress:
        info = build_dataset(source, output, resolution, crop, strict, progress, channels)
    size, split = output.stat().st_size, split_names(info.names)
    if as_json:
        about = info.model_dump(exclude={"names", "unused"})
        summary = {"path": str(output), "bytes": size, **about, "split": str(split)}
        print_json(summary)
        return
    say(f"{info.count} images of {image_size(resolution, channels)} in {output} ({size / 1e6:.1f} MB)")
    for reason, count in info.skipped.items():
        say(f"skipped {count}: {reason}")
    say(f"split: {split}")
    say_next(f"hflow-rt train --data {quoted(output)}")


@contextmanager
def _progress_bar() -> Iterator["Progress | None"]:
    """A bar with rate and time left on stderr; none where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} files/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, rate="-")

        def advance(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.0f}" if speed else "-")

        yield advance
