"""`hflow-rt import`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.options import JsonOption
from hflow_rt.cli.terminal import print_json, say, say_next, status
from hflow_rt.extras import need_extra
from hflow_rt.names import image_size, quoted


@app.command("import")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="A published checkpoint, or a state dict.")],
    family: Annotated[
        str | None, typer.Option(help="The kind of model it holds; by default as found.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="RUN", help="The run's folder; by default runs/FILE.", show_default=False
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(help="The original's settings (.json), where FILE does not hold them.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Images (a folder or archive) to estimate what FILE lacks from.", show_default=False),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The entry of FILE to take, where several hold weights.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Turn a published checkpoint into a run, executing nothing that is in it.

    Reads the original's own format, and .safetensors or .pt files of its weights.

    Example: hflow-rt import model_iter_900000.bin -o runs/published
    """
    need_extra("train", "torch")
    from hflow_rt.foreign.importing import import_published
    from hflow_rt.foreign.parts import WHOLE
    from hflow_rt.runs import ROOT

    run = output or ROOT / checkpoint.stem
    with status(quiet=json) as progress:
        found = import_published(checkpoint, family, run, settings, images, part, progress)
    if json:
        print_json(found.dump())
        return
    size = f"{found.family} {image_size(found.resolution, found.channels)}"
    complete = "" if found.passed_over else ", each accounted for"
    say(f"{run}: {size}, {found.parameters:,} tensors of {found.values:,} values read{complete}")
    if found.part != WHOLE:
        say(f"weights taken from {found.part}")
    if found.prefix:
        say(f"names begin with {found.prefix}, taken off")
    if found.passed_over:
        say(f"passed over: {', '.join(f'{name} ({kind})' for name, kind in found.passed_over.items())}")
    if found.dropped:
        counts = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in found.dropped.items())
        say(f"dropped because they are recomputed: {counts}")
    if (learned := found.learned) is not None:
        say(f"{learned['what']} estimated from {learned['images']} training images of {learned['source']}")
        say(f"  ({learned['split']})")
        if "not_used" in learned:
            say(f"  (not used: {learned['not_used']})")
    for note in found.notes:
        say(f"note: {note}")
    say_next(f"hflow-rt export {quoted(run)}")
