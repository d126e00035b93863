"""`hflow-rt project`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hflow_rt.cli.latents import Asked, latent_command
from hflow_rt.cli.options import ControlOption
from hflow_rt.cli.terminal import note, tracked
from hflow_rt.extras import need_extra
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from hflow_rt.projection.projecting import Step

_SHOWN = 8  # images
_FRAMES = 100  # of the way there, about


@latent_command(
    "projected.safetensors", "seed", "label", about="Where the values go, a latents file (.safetensors).", panel=None
)
def project(
    asked: Asked,
    images: Annotated[list[Path], typer.Argument(help="Image files, folders or archives.")],
    space: Annotated[
        str | None,
        typer.Option(
            help="Where to search; by default the model's first space beside its latents.", show_default=False
        ),
    ] = None,
    per_slot: Annotated[
        bool,
        typer.Option("--per-slot", help="Values of its own for every layer: nearer, but less of the model's kind."),
    ] = False,
    steps: Annotated[int, typer.Option(help="Of the search.")] = 1000,
    batch: Annotated[int, typer.Option(help="Images that are searched for together.")] = 8,
    features: Annotated[
        str, typer.Option(help="What sees likeness: efficientnet-lite0, or a TorchScript file such as LPIPS.")
    ] = "efficientnet-lite0",
    control: ControlOption = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also write originals over what was found.", show_default=False)
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="Also show the way there (.gif, .webp, .mp4).", show_default=False)
    ] = None,
) -> None:
    """Search for values of a space of the model whose images are like yours, where there is no inverse.

    Example: hflow-rt project photo.png -o projected.safetensors --picture projected.png
    """
    import numpy as np

    from hflow_rt.errors import BackendUnavailable
    from hflow_rt.limits import check_count
    from hflow_rt.runtime.images.pictures import check_picture_name, grid, labelled_rows, save_image, to_uint8
    from hflow_rt.runtime.images.reading import not_as_they_are
    from hflow_rt.runtime.images.video import check_animation, kept, save_animation
    from hflow_rt.runtime.latents.files import about_model, check_latents_name, save_latents
    from hflow_rt.runtime.latents.operations import concatenate
    from hflow_rt.runtime.noise import parse_controls

    need_extra("train", "torch")
    check_latents_name(asked.output)
    if picture is not None:
        check_picture_name(picture)
    if video is not None:
        check_animation(video, 24)
    check_count("the batch", batch)
    session = asked.open()
    controls = parse_controls(control or [])
    session.check_controls(controls)

    import torch

    from hflow_rt.models.checkpoint import load_model
    from hflow_rt.projection.projecting import project as search
    from hflow_rt.projection.projecting import space_to_search

    cuda = torch.cuda.is_available() and asked.device != "cpu"
    if asked.device not in ("auto", "cpu") and not cuda:
        raise BackendUnavailable("torch finds no CUDA device here, which a search needs; use --device cpu")
    model = load_model(session.bundle.model).to("cuda" if cuda else "cpu")
    space = space_to_search(model, space)
    names, pixels = asked.read(session, images)
    for line in not_as_they_are(images):
        note(line)
    known = asked.conditions(session, names) if session.conditions.keys() & session.space_shapes(space).keys() else {}
    found, distances, frames = [], np.zeros(0), []
    every = max(1, steps // _FRAMES)
    for start in range(0, len(pixels), batch):
        part = slice(start, start + batch)
        told = {name: rows[part] for name, rows in known.items()}
        way = search(
            model,
            pixels[part],
            space=space,
            steps=steps,
            per_slot=per_slot,
            features=features,
            conditions=told or None,
            controls=controls,
            seed=asked.seed,
        )
        label = f"projecting {min(start + batch, len(pixels))} of {len(pixels)}"
        for number, step in enumerate(tracked(way, steps, lambda _: 1, label, _far)):
            if video is not None and start == 0 and (number % every == 0 or number + 1 == steps):
                shown = session.decode(space, step.values | told, controls)
                frames.append(np.asarray(grid(to_uint8(shown)))[None])
        found.append(step.values | told)
        distances = np.concatenate([distances, step.distances])
        if not asked.json:
            note(f"{min(start + batch, len(pixels))} of {len(pixels)} images, {_far(step)}")
    values = concatenate(found)
    again = session.decode(space, values, controls)
    errors = np.sqrt(np.square(again - pixels).mean((1, 2, 3)))
    about = {
        "space": space,
        "images": names,
        "search_steps": steps,
        "seed": asked.seed,
        "distances": distances.tolist(),
    }
    save_latents(asked.output, values, about_model(session) | about | ({"controls": controls} if controls else {}))
    if picture is not None:
        rows = [("original", to_uint8(pixels[:_SHOWN])), ("projected", to_uint8(again[:_SHOWN]))]
        save_image(picture, labelled_rows(rows))
    if video is not None:
        save_animation(video, kept(frames, video), 24)
    lines = [
        f"{name}: distance {far:.3f}, pixels differ by {error:.4f} (RMS, in 0 .. 1)"
        for name, far, error in list(zip(names, distances, errors, strict=True))[:_SHOWN]
    ]
    lines.append(f"{len(names)} images as values of {space}: {asked.output}" + (f"; {picture}" if picture else ""))
    report = about | {"rms": errors.tolist()}
    asked.finish(report, lines, f"hflow-rt decode {quoted(asked.output)}{asked.again} -o decoded.png")


def _far(step: "Step") -> str:
    return f"distance {step.distances.mean():.3f}"
