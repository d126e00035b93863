"""`hflow-rt attribute make` and `hflow-rt attribute apply`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import Commands, app
from hflow_rt.cli.latents import LATENTS, Asked, latent_command
from hflow_rt.cli.options import ImagesArgument, TensorOption
from hflow_rt.cli.terminal import tracked
from hflow_rt.names import quoted

attribute = Commands(
    help="Find what sets two kinds of images apart, and add it to others.\n\n"
    "Example: hflow-rt attribute make smiling/ neutral/ -o smile.safetensors",
    no_args_is_help=True,
)
app.add_typer(attribute, name="attribute", rich_help_panel=LATENTS)


@latent_command("attribute.safetensors", "label", about="Where it goes (.safetensors).", panel=None, to=attribute)
def make(
    asked: Asked,
    positive: Annotated[Path, typer.Argument(help="A folder or archive of images that have it.")],
    negative: Annotated[Path, typer.Argument(help="A folder or archive of images that lack it.")],
    tensor: TensorOption = None,
) -> None:
    """Take the mean difference between the latents of two sets of images.

    Example: hflow-rt attribute make smiling/ neutral/ -o smile.safetensors
    """
    from hflow_rt.errors import DataError
    from hflow_rt.runtime.latents.attributes import measure_attribute, save_attribute
    from hflow_rt.runtime.latents.nearest import find_tensor, points

    if asked.output.suffix.lower() != ".safetensors":
        raise DataError(f"an attribute's name must end in .safetensors; found '{asked.output.name}'; rename it")
    session = asked.open()
    where = find_tensor(session, tensor)
    sides = [asked.read(session, [source]) for source in (positive, negative)]
    a, b = (points(session, asked.encode(session, *side, only=where.only).latents, where) for side in sides)
    found = measure_attribute(session, where, a, b, (str(positive), str(negative)))
    save_attribute(asked.output, found)
    about = found.about
    sets = f"{about.positives} images of {positive} against {about.negatives} of {negative}"
    asked.finish(
        about.model_dump(),
        [
            f"{sets}, in {where.name}: {asked.output}",
            f"length {about.norm:.3g}; means {about.separation:.2f} stds apart (d'), "
            f"{about.held_out_separation:.2f} where each image is judged by the others",
        ],
        f"hflow-rt attribute apply {quoted(asked.output)}{asked.again} --gain -2:2:5 -o attribute.png",
    )


@latent_command("attribute.png", "number", "seed", "std", "label", panel=None, to=attribute)
def apply(
    asked: Asked,
    file: Annotated[Path, typer.Argument(metavar="ATTRIBUTE", help="A file of 'attribute make'.")],
    images: ImagesArgument = None,
    gain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="G|FROM:TO:COUNT",
            help="How much of it to add; 1 is the whole difference. Repeatable.",
            show_default="-2:2:5",
        ),
    ] = None,
) -> None:
    """Add an attribute to images with several gains; their finer latents stay as they are.

    Example: hflow-rt attribute apply smile.safetensors photo.png --gain -2:2:5 -o smile.png
    """
    from hflow_rt.runtime.images.pictures import to_uint8
    from hflow_rt.runtime.latents.attributes import check_attribute, load_attribute, move, parse_gains

    gains = parse_gains(gain or ["-2:2:5"])
    found = load_attribute(file)
    session = asked.open_for_picture()
    check_attribute(session, found, str(file))
    if not images:
        asked.check_table(session, len(gains), asked.number)
    start = asked.start(session, images)
    count = len(start.names)
    columns = [
        to_uint8(session.forward(move(session, start.latents, found, value)))
        for value in tracked(gains, len(gains) * count, lambda _: count, "decoding")
    ]
    captions = [f"{value:+g}" if value else "0" for value in gains]
    asked.save_columns(start.names, columns, captions)
    asked.finish(
        {"images": start.names, "gains": gains, "in": found.about.name},
        [f"{count} images at gains {' '.join(captions)} in {found.about.name}: {asked.output}"],
        f"hflow-rt attribute apply {quoted(file)} IMAGE{asked.again} --gain -4:4:9 -o more.png",
    )
