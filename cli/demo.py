"""`hflow-rt demo`: everything once, on the bundled images, with a page to look at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.terminal import say, say_next, tracked
from hflow_rt.errors import DataError
from hflow_rt.files import is_file, is_ours, removed_if_empty

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.runtime.session import Session

_STDS = (0.4, 0.7, 1.0)
_COLUMNS = 10
_SHIPPED, _AT_ONCE = 24, 8  # samples of the bundled model
_PAGE = "demo"  # folder of the run
_FILES = ("index.html", "bundled.png", "samples.png", "reconstruction.png", "interpolation.png", "interpolation.gif")


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 2.0,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder; by default runs/PRESET-DATE-TIME.", show_default=False),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Images; by default the bundled ones.", show_default=False)] = None,
) -> None:
    """Train the small model, export and check it, sample, encode and interpolate; writes a page with the pictures.

    First it draws samples of the bundled model, with which the page begins.

    Example: hflow-rt demo --minutes 2
    """
    from hflow_rt.cli.export import export
    from hflow_rt.cli.train import train
    from hflow_rt.models.registry import DEFAULT_PRESET
    from hflow_rt.runs import new_run, read_run
    from hflow_rt.runtime import load

    run = out or new_run(DEFAULT_PRESET)
    for name in _FILES:
        if is_file(run / _PAGE / name) and not is_ours(run / _PAGE / name):
            raise DataError(f"{run / _PAGE / name} exists and was not written by hflow-rt; choose another --out")
    shipped = _shipped()
    with removed_if_empty(run):
        train(preset=DEFAULT_PRESET, data=data, out=run, minutes=minutes)
    export(run=run)
    session = load(run, "onnx", "cpu")
    page = run / _PAGE
    pictures = _draw(session, page, data, shipped)
    _write_page(page / "index.html", session, read_run(run), pictures)
    say(f"the page: {page / 'index.html'}; the pictures: {', '.join(pictures)} beside it")
    say_next(
        "hflow-rt sample --std 0.7",
        "hflow-rt interpolate -o walk.gif",
        "hflow-rt train --data YOUR_IMAGES.zip",
    )


def _shipped() -> "NDArray[np.uint8]":
    """Samples of the bundled model."""
    import numpy as np

    from hflow_rt.assets import pretrained
    from hflow_rt.runtime import load
    from hflow_rt.runtime.images.pictures import to_uint8

    session = load(pretrained(), "onnx", "cpu")
    parts = session.draw(range(_SHIPPED), seed=1, batch=_AT_ONCE)
    drawn = (to_uint8(session.forward(part)) for part in parts)
    return np.concatenate(list(tracked(drawn, _SHIPPED, len, "drawing what ships")))


def _draw(session: "Session", page: Path, data: Path | None, shipped: "NDArray[np.uint8]") -> dict[str, str]:
    """Write every picture; returns file name to caption."""
    import numpy as np

    from hflow_rt.assets import PRETRAINED, demo_images
    from hflow_rt.conditions import by_folder
    from hflow_rt.data.dataset import open_dataset
    from hflow_rt.runtime.images.pictures import grid, labelled_rows, save_image, to_uint8
    from hflow_rt.runtime.images.video import save_animation
    from hflow_rt.runtime.latents.latent_views import between, select
    from hflow_rt.runtime.latents.operations import concatenate, ping_pong

    save_image(page / "bundled.png", grid(shipped, 8))
    rows = [(f"std {std}", to_uint8(session.sample(_COLUMNS, std))) for std in _STDS]
    save_image(page / "samples.png", labelled_rows(rows))

    images = open_dataset(data or demo_images(), session.resolution, channels=session.channels)
    held_out = images.split()[1]
    chosen = held_out[:: max(1, len(held_out) // _COLUMNS)][:_COLUMNS]
    pixels = images.pixels(chosen).astype(np.float32) / 255
    latents = session.inverse(pixels, by_folder(session.conditions, [images.names[index] for index in chosen])).latents
    detail = list(session.latent_shapes)[-1]
    coarse = latents | {detail: np.zeros_like(latents[detail])}
    rows = [
        ("held out", to_uint8(pixels)),
        ("decoded", to_uint8(session.forward(latents))),
        (f"{detail} = 0", to_uint8(session.forward(coarse))),
    ]
    save_image(page / "reconstruction.png", labelled_rows(rows))

    ends = concatenate([select(latents, 0), select(latents, min(4, len(chosen) - 1))])

    def frames(number: int, mode: str, space: str = "z") -> "NDArray[np.uint8]":
        return to_uint8(np.concatenate(list(between(session, ends, number, mode, space))))

    walks = [(f"in {space}", frames(_COLUMNS, "slerp" if space == "z" else "lerp", space)) for space in session.spaces]
    save_image(page / "interpolation.png", labelled_rows(walks))
    big = frames(24, "slerp").repeat(4, 1).repeat(4, 2)
    save_animation(page / "interpolation.gif", big, 12, ping_pong(24))
    return {
        "bundled.png": f"What ships: hflow-rt sample --model {PRETRAINED} -n {_SHIPPED} --seed 1.",
        "samples.png": "Samples of the exported engine: the same noise at three temperatures.",
        "reconstruction.png": f"Images the model never saw, encoded and decoded; last: without latent {detail}.",
        "interpolation.png": "Between two held-out images, in every space the model offers.",
        "interpolation.gif": "The same walk as a loop.",
    }


def _write_page(path: Path, session: "Session", run: dict[str, Any], pictures: dict[str, str]) -> None:
    import html
    import json

    from hflow_rt.files import atomic_file

    manifest = session.manifest
    assert manifest.parity is not None
    facts = json.dumps(manifest.checkpoint, indent=1)
    verdict = (
        "verified: the engines are the model"
        if manifest.verified
        else "NOT VERIFIED: " + "; ".join(manifest.parity["failures"])
    )
    figures = "\n".join(
        f'<figure><img src="{name}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
        for name, caption in pictures.items()
    )
    text = f"""<!doctype html>
<meta charset="utf-8"><title>hflow-rt demo</title>
<style>body{{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}
img{{max-width:100%;image-rendering:pixelated}}
figure{{margin:2em 0}}
pre{{background:#f4f4f4;padding:1em;overflow:auto}}</style>
<h1>{html.escape(f"{manifest.family} {manifest.size}, run {path.parents[1].name}")}</h1>
<p>Engines: {html.escape(", ".join(manifest.graphs))} on {html.escape(session.backend)}; {html.escape(verdict)}.</p>
{figures}
<h2>Training</h2><pre>{html.escape(facts)}</pre>
"""
    with atomic_file(path) as temporary:
        temporary.write_text(text)
