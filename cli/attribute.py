"""`hflow-rt attribute make` and `hflow-rt attribute apply`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hflow_rt.cli.app import Commands, app
from hflow_rt.cli.latents import LATENTS, Asked, are_latents, latent_command
from hflow_rt.cli.options import TensorOption
from hflow_rt.cli.terminal import tracked
from hflow_rt.names import quoted

if TYPE_CHECKING:
    from hflow_rt.runtime.latents.nearest import TensorAddress
    from hflow_rt.runtime.session import Array, Session

attribute = Commands(
    help="Find what sets two kinds of images apart, and add it to others.\n\n"
    "Example: hflow-rt attribute make smiling/ neutral/ -o smile.safetensors",
    no_args_is_help=True,
)
app.add_typer(attribute, name="attribute", rich_help_panel=LATENTS)


@latent_command("attribute.safetensors", "label", about="Where it goes (.safetensors).", panel=None, to=attribute)
def make(
    asked: Asked,
    positive: Annotated[Path, typer.Argument(help="A folder, archive or latents file of images that have it.")],
    negative: Annotated[Path, typer.Argument(help="A folder, archive or latents file of images that lack it.")],
    tensor: TensorOption = None,
) -> None:
    """Take the mean difference between the latents of two sets of images.

    Of a model that has no inverse: between two latents files of 'project' or 'sample'.

    Example: hflow-rt attribute make smiling/ neutral/ -o smile.safetensors
    """
    from hflow_rt.errors import DataError
    from hflow_rt.runtime.latents.attributes import measure_attribute, save_attribute
    from hflow_rt.runtime.latents.nearest import find_tensor

    if asked.output.suffix.lower() != ".safetensors":
        raise DataError(f"an attribute's name must end in .safetensors; found '{asked.output.name}'; rename it")
    session = asked.open()
    where = find_tensor(session, tensor)
    a, b = (_points(asked, session, source, where) for source in (positive, negative))
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


def _points(asked: Asked, session: "Session", source: Path, where: "TensorAddress") -> "Array":
    from hflow_rt.runtime.latents.files import as_made
    from hflow_rt.runtime.latents.nearest import points

    if are_latents([source]):
        space, found = asked.values(as_made(session, [source]), [source])
        return points(session, found.latents, where, space)
    return points(session, asked.encode(session, *asked.read(session, [source]), only=where.only).latents, where)


@latent_command("attribute.png", "number", "seed", "std", "label", panel=None, to=attribute)
def apply(
    asked: Asked,
    file: Annotated[Path, typer.Argument(metavar="ATTRIBUTE", help="A file of 'attribute make'.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files, folders, archives or latents files; by default samples.", show_default=False),
    ] = None,
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
    from hflow_rt.runtime.latents.files import as_made
    from hflow_rt.runtime.session import LATENT_SPACE

    gains = parse_gains(gain or ["-2:2:5"])
    found = load_attribute(file)
    session = asked.open_for_picture()
    check_attribute(session, found, str(file))
    if not images:
        asked.check_table(session, len(gains), asked.number)
    from_files = bool(images) and are_latents(images or [])
    session = as_made(session, images or []) if from_files else session
    space, start = asked.values(session, images or []) if from_files else (LATENT_SPACE, asked.start(session, images))
    count = len(start.names)
    columns = [
        to_uint8(session.decode(found.about.space, move(session, start.latents, found, value, space)))
        for value in tracked(gains, len(gains) * count, lambda _: count, "decoding")
    ]
    captions = [f"{value:+g}" if value else "0" for value in gains]
    asked.save_columns(start.names, columns, captions)
    asked.finish(
        {"images": start.names, "gains": gains, "in": found.about.name},
        [f"{count} images at gains {' '.join(captions)} in {found.about.name}: {asked.output}"],
        f"hflow-rt attribute apply {quoted(file)} IMAGE{asked.again} --gain -4:4:9 -o more.png",
    )
