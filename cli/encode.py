"""`hflow-rt encode` and `hflow-rt decode`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import (
    BackendOption,
    DeviceOption,
    JsonOption,
    LabelOption,
    ModelOption,
    named,
    open_session,
    read_pictures,
    told,
)
from hflow_rt.cli.terminal import note, print_json, say, say_next, tracked
from hflow_rt.names import quoted

_BATCH = 16


@app.command()
def encode(
    images: Annotated[list[Path], typer.Argument(help="Image files, folders or archives.")],
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the latents go (.safetensors).")] = Path(
        "latents.safetensors"
    ),
    picture: Annotated[Path | None, typer.Option(help="Also write originals over their reconstructions.")] = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Map images to latents, exactly, with their log-probability.

    Example: hflow-rt encode photo.png -o latents.safetensors --picture reconstruction.png
    """
    import numpy as np

    from hflow_rt.runtime.latents import check_latents_name, concatenate, save_latents
    from hflow_rt.runtime.pictures import check_picture_name, labelled_rows, save_image, to_uint8

    check_latents_name(output)
    if picture is not None:
        check_picture_name(picture)
    session = open_session(model, backend, device, quiet=json)
    unused: dict[str, str] = {}
    names, pixels = read_pictures(
        images, session.resolution, choices=session.choices, unused=unused, channels=session.channels
    )
    conditions = told(session, names, label)
    starts = [slice(start, start + _BATCH) for start in range(0, len(pixels), _BATCH)]
    size = lambda part: len(pixels[part])  # noqa: E731
    encoded = [
        session.inverse(pixels[part], {name: value[part] for name, value in conditions.items()})
        for part in tracked(starts, len(pixels), size, "encoding")
    ]
    latents = concatenate([part.latents for part in encoded])
    log_prob = np.concatenate([part.log_prob for part in encoded])
    bits = session.bits_per_dim(log_prob)
    about = {
        "family": session.manifest.family,
        "model": session.manifest.checkpoint["sha256"],
        "images": names,
        "skipped": unused,
    }
    save_latents(output, latents, about | {"log_prob": [float(value) for value in log_prob]})
    if picture is not None:
        first = {name: values[:8] for name, values in latents.items()}
        rows = [("original", to_uint8(pixels[:8])), ("decoded", to_uint8(session.forward(first)))]
        save_image(picture, labelled_rows(rows))
    if json:
        values = [float(value) for value in bits]
        print_json({"output": str(output), "images": names, "skipped": unused, "bits_per_dim": values})
        return
    for name, value in list(zip(names, bits, strict=True))[:8]:
        say(f"{name}: {value:.3f} bits/dim (plug-in estimate)")
    say(f"latents of {len(names)} images: {output}" + (f"; reconstruction: {picture}" if picture else ""))
    say_next(f"hflow-rt decode {quoted(output)}{named(model, '--model ')} -o decoded.png")


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="A latents file of encode or sample.")],
    model: ModelOption = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="A grid (.png, .jpg, .webp), or a folder for one file each."),
    ] = Path("decoded.png"),
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Map latents back to images.

    Example: hflow-rt decode latents.safetensors -o decoded.png
    """

    import numpy as np

    from hflow_rt.runtime.latents import check_latents, load_latents
    from hflow_rt.runtime.pictures import (
        check_folder,
        check_picture_name,
        check_picture_size,
        grid_size,
        to_uint8,
        write_pictures,
    )

    session = open_session(model, backend, device, quiet=json)
    values, about = load_latents(latents)
    check_latents(values, session.input_shapes, str(latents))
    if about.get("model") not in (None, session.manifest.checkpoint["sha256"]):
        note(f"warning: {latents} was made by another training state of this kind of model")
    count = len(next(iter(values.values())))
    if output.suffix:
        check_picture_name(output)
        check_picture_size(output, *grid_size(count, session.resolution))
    else:
        check_folder(output, range(count))
    batches = [{name: v[start : start + _BATCH] for name, v in values.items()} for start in range(0, count, _BATCH)]
    size = lambda part: len(next(iter(part.values())))  # noqa: E731
    images = [to_uint8(session.forward(part)) for part in tracked(batches, count, size, "decoding")]
    where = write_pictures(output, np.concatenate(images))
    if json:
        print_json({"images": count, "output": where})
        return
    say(f"{count} images: {where}")
    say_next(f"hflow-rt sample{named(model)}")
