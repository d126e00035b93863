"""`hflow-rt attribute make` and `hflow-rt attribute apply`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import Commands, app
from hflow_rt.cli.common import (
    LATENTS,
    BackendOption,
    DeviceOption,
    ImagesArgument,
    JsonOption,
    LabelOption,
    ModelOption,
    PlaceOption,
    SeedOption,
    StdOption,
    encoded,
    named,
    open_session,
    read_pictures,
    starting_points,
    told,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked
from hflow_rt.names import quoted

attribute = Commands(
    help="Find what sets two kinds of images apart, and add it to others.\n\n"
    "Example: hflow-rt attribute make smiling/ neutral/ -o smile.safetensors",
    no_args_is_help=True,
)
app.add_typer(attribute, name="attribute", rich_help_panel=LATENTS)


@attribute.command()
def make(
    positive: Annotated[Path, typer.Argument(help="A folder or archive of images that have it.")],
    negative: Annotated[Path, typer.Argument(help="A folder or archive of images that lack it.")],
    place: PlaceOption = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where it goes (.safetensors).")] = Path(
        "attribute.safetensors"
    ),
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Take the mean difference between the encodings of two sets of images.

    Example: hflow-rt attribute make smiling/ neutral/ -o smile.safetensors
    """
    from hflow_rt.errors import DataError
    from hflow_rt.runtime.directions import measure_direction, save_direction
    from hflow_rt.runtime.encodings import encodings, find_place

    if output.suffix.lower() != ".safetensors":
        raise DataError(f"a direction's name must end in .safetensors; found '{output.name}'; rename it")
    session = open_session(model, backend, device, quiet=json)
    where = find_place(session, place)
    sides = [
        read_pictures([source], session.resolution, choices=session.choices, channels=session.channels)
        for source in (positive, negative)
    ]
    a, b = (encodings(session, encoded(session, pixels, told(session, names, label)), where) for names, pixels in sides)
    direction = measure_direction(session, where, a, b, (str(positive), str(negative)))
    save_direction(output, direction)
    about = direction.about
    if json:
        print_json({"output": str(output), **about.model_dump()})
        return
    say(f"{about.positives} images of {positive} against {about.negatives} of {negative}, in {where.name}: {output}")
    say(
        f"length {about.norm:.3g}; means {about.separation:.2f} stds apart (d'), "
        f"{about.held_out_separation:.2f} where each image is judged by the others"
    )
    say_next(f"hflow-rt attribute apply {quoted(output)}{named(model, '--model ')} --gain -2:2:5 -o attribute.png")


@attribute.command()
def apply(
    direction: Annotated[Path, typer.Argument(help="A file of 'attribute make'.")],
    images: ImagesArgument = None,
    gain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="G|FROM:TO:COUNT",
            help="How much of it to add; 1 is the whole difference. Repeatable.",
            show_default="-2:2:5",
        ),
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp).")] = Path(
        "attribute.png"
    ),
    number: Annotated[int, typer.Option("-n", "--number", help="How many samples, or of the images.")] = 4,
    seed: SeedOption = 0,
    std: StdOption = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Add a direction to images with several gains; their finer latents stay as they are.

    Example: hflow-rt attribute apply smile.safetensors photo.png --gain -2:2:5 -o smile.png
    """
    import numpy as np

    from hflow_rt.runtime.directions import check_direction, load_direction, move, parse_gains
    from hflow_rt.runtime.pictures import (
        Row,
        check_picture_name,
        check_picture_size,
        save_image,
        table,
        table_size,
        to_uint8,
    )

    check_picture_name(output)
    gains = parse_gains(gain or ["-2:2:5"])
    found = load_direction(direction)
    session = open_session(model, backend, device, quiet=json)
    check_direction(session, found, str(direction))
    if not images:
        check_picture_size(output, *table_size(len(gains), number, session.resolution))
    names, _, latents = starting_points(session, images, number, seed, std, label)
    columns = [
        to_uint8(session.forward(move(session, latents, found, value)))
        for value in tracked(gains, len(gains) * len(names), lambda _: len(names), "decoding")
    ]
    captions = [f"{value:+g}" if value else "0" for value in gains]
    shown = np.stack(columns, axis=1)
    save_image(output, table([Row(row, Path(name).name, captions) for name, row in zip(names, shown, strict=True)]))
    if json:
        print_json({"output": str(output), "images": names, "gains": gains, "in": found.about.name})
        return
    say(f"{len(names)} images at gains {' '.join(captions)} in {found.about.name}: {output}")
    say_next(f"hflow-rt attribute apply {quoted(direction)} IMAGE{named(model, '--model ')} --gain -4:4:9 -o more.png")
