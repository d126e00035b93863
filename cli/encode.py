"""`hflow-rt encode` and `hflow-rt decode`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hflow_rt.cli.latents import Asked, latent_command, set_by
from hflow_rt.cli.opening import named
from hflow_rt.cli.options import GRID, ControlOption, StepsOption
from hflow_rt.cli.sharded import KeepOption, ProcessesOption, RayOption, ShardOption, ShardsOption, Sharing, in_shards
from hflow_rt.cli.terminal import note, tracked
from hflow_rt.errors import DataError
from hflow_rt.names import quoted

_SHOWN = 8  # images


@latent_command("latents.safetensors", "seed", "label", about="Where the latents go (.safetensors).", panel=None)
def encode(
    asked: Asked,
    images: Annotated[list[Path], typer.Argument(help="Image files, folders or archives.")],
    picture: Annotated[Path | None, typer.Option(help="Also write originals over their reconstructions.")] = None,
    control: ControlOption = None,
    steps: StepsOption = None,
    posterior: Annotated[
        bool, typer.Option("--posterior", help="Draw latents of a model that tells a distribution, not its mean.")
    ] = False,
    shards: ShardsOption = None,
    shard: ShardOption = None,
    processes: ProcessesOption = 1,
    ray: RayOption = None,
    keep: KeepOption = None,
    files: Annotated[
        Literal["safetensors", "parquet"],
        typer.Option("--format", help="Of shards: exact latents, or a row an image.", rich_help_panel="Shards"),
    ] = "safetensors",
) -> None:
    """Map images to latents, as exactly as the model can, with their log-probability.

    Latents of a model of many steps are decoded at once, and each image is marked exact or not.

    Example: hflow-rt encode photo.png -o latents.safetensors --picture reconstruction.png
    """
    from hflow_rt.manifest import LOG_PROB
    from hflow_rt.runtime.images.pictures import check_picture_name, labelled_rows, save_image, to_uint8
    from hflow_rt.runtime.latents.files import about_model, check_latents_name, save_latents
    from hflow_rt.runtime.latents.round_trips import decoded, round_trip, together
    from hflow_rt.runtime.noise import parse_controls
    from hflow_rt.runtime.shard_files import encoding_settings

    output, controls = asked.output, parse_controls(control or [])
    sharing = Sharing(shards, shard, processes, ray, asked.backend, asked.device)
    if sharing.asked:
        if picture or posterior or len(images) != 1:
            raise DataError("in shards one source of images goes into a folder -o; omit --picture and --posterior")
        session = asked.open()
        session = (session if steps is None else session.in_steps(steps)).with_controls(controls)
        how = encoding_settings(session, asked.seed, keep, asked.label, images[0], files) | set_by(controls, steps)
        in_shards(session, "encode", output, images[0], None, sharing, how, files, asked.json)
        return
    if keep or files != "safetensors":
        raise DataError("--keep and --format are for jobs in shards; say --shards, or omit them")
    check_latents_name(output)
    if picture is not None:
        check_picture_name(picture)
    session = asked.open()
    session = session if steps is None else session.in_steps(steps)
    unused: dict[str, str] = {}
    names, pixels = asked.read(session, images, unused=unused)
    found = asked.encode(session, names, pixels, controls=controls, posterior=posterior)
    count = len(found.names)
    about: dict[str, Any] = {"images": found.names, "skipped": unused} | set_by(controls, steps)
    about |= {"posterior": True, "seed": asked.seed} if posterior else {}
    trip = None
    if session.steps > 1:
        trip = round_trip(
            session, found.pixels, found.latents, controls, lambda parts: tracked(parts, count, len, "decoding")
        )
        about["round_trip"] = trip.model_dump(mode="json")
    scores = {name: values.tolist() for name, values in found.scores.items()}
    save_latents(output, found.latents, about_model(session) | about | scores)
    if picture is not None:
        again = to_uint8(next(decoded(session, found.latents, controls, together(session, count))))[:_SHOWN]
        save_image(picture, labelled_rows([("original", to_uint8(found.pixels[:_SHOWN])), ("decoded", again)]))
    measured = LOG_PROB in scores
    bits = session.bits_per_dim(found.scores[LOG_PROB]).tolist() if measured else []
    lines = [f"{name}: {value:.3f} bits/dim (plug-in estimate)" for name, value in zip(found.names, bits, strict=False)]
    lines = lines[:_SHOWN] + ([] if trip is None else [trip.words([Path(name).name for name in found.names])])
    what = f"latents of {count} images: {output}" + (f"; reconstruction: {picture}" if picture else "")
    report = about | ({"bits_per_dim": bits} if measured else {})
    asked.finish(report, [*lines, what], f"hflow-rt decode {quoted(output)}{asked.again} -o decoded.png")


@latent_command("decoded.png", about=GRID, panel=None)
def decode(
    asked: Asked,
    latents: Annotated[Path, typer.Argument(help="A latents file of encode, project or sample.")],
) -> None:
    """Map latents back to images.

    Example: hflow-rt decode latents.safetensors -o decoded.png
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import check_pictures, to_uint8, write_pictures
    from hflow_rt.runtime.latents.files import how_made, load_latents
    from hflow_rt.runtime.latents.operations import check_latents
    from hflow_rt.runtime.latents.round_trips import decoded, together

    session = asked.open()
    values, about = load_latents(latents)
    made = how_made(about, str(latents))
    session = session if made.steps is None else session.in_steps(made.steps)
    check_latents(values, session.space_shapes(made.space), str(latents))
    if made.model not in (None, session.manifest.checkpoint["sha256"]):
        note(f"warning: {latents} was made by another training state of this kind of model")
    trip, count = made.round_trip, len(next(iter(values.values())))
    if trip is not None and trip.backend != session.backend:
        note(f"note: what {latents} says of exactness holds on {trip.backend}, and this is {session.backend}")
    check_pictures(asked.output, range(count), session.resolution)
    batch = together(session, count) if trip is None else trip.batch
    shown = lambda parts: tracked(parts, count, len, "decoding")  # noqa: E731
    parts = decoded(session, values, made.controls, batch, shown, made.space)
    where = write_pictures(asked.output, np.concatenate([to_uint8(part) for part in parts]))
    report = {"images": count, "output": where}
    asked.finish(report, [f"{count} images: {where}"], f"hflow-rt sample{named(asked.model)}")
