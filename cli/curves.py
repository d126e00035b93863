"""`hflow-rt curves`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.options import JsonOption
from hflow_rt.cli.terminal import print_json, say, say_next
from hflow_rt.extras import need_extra
from hflow_rt.names import quoted


@app.command()
def curves(
    run: Annotated[Path | None, typer.Argument(help="A run; by default the latest one.", show_default=False)] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where it goes (.png).")] = Path("curves.png"),
    json: JsonOption = False,
) -> None:
    """Draw what a run logged while it trained: losses, bounds, distances, rates.

    Example: hflow-rt curves runs/my-run -o curves.png
    """
    from hflow_rt.errors import DataError
    from hflow_rt.runs import resolve_run

    if output.suffix.lower() != ".png":
        raise DataError(f"the picture's name must end in .png; found '{output.name}'; rename it")
    need_extra("train", "tensorboard")
    from hflow_rt.training.curves import draw_curves, read_curves

    folder = resolve_run(run)
    found = read_curves(folder)
    seen = max(int(curve.images[-1]) for curve in found.values())
    panels = draw_curves(found, output, f"{folder.name}, {seen:,} images")
    if json:
        print_json({"output": str(output), "run": str(folder), "images": seen, "panels": panels})
        return
    say(f"{len(found)} curves of {folder}, {seen:,} images: {output}")
    say_next(f"hflow-rt train --resume {quoted(folder)}")
