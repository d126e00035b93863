"""`hflow-rt score` and `hflow-rt shards`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.opening import open_session
from hflow_rt.cli.options import BackendOption, DeviceOption, JsonOption, LabelOption, ModelOption
from hflow_rt.cli.sharded import (
    KeepOption,
    ProcessesOption,
    RayOption,
    ShardOption,
    ShardsOption,
    Sharing,
    continued,
    in_shards,
)
from hflow_rt.cli.terminal import print_json, say, say_next
from hflow_rt.errors import DataError


@app.command()
def score(
    images: Annotated[Path, typer.Argument(help="Images: a folder, archive, .parquet, array, ... (docs/data.md).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the shards (.parquet).")] = Path(
        "scores"
    ),
    shards: ShardsOption = None,
    shard: ShardOption = None,
    processes: ProcessesOption = 1,
    ray: RayOption = None,
    keep: KeepOption = None,
    label: LabelOption = None,
    model: ModelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Say how likely each of many images is to the model, a row each, for finding what does not belong.

    Example: hflow-rt score photos/ --shards 16 --processes 2 -o scores/
    """
    from hflow_rt.runtime.shard_files import encoding_settings

    session = open_session(model, backend, device, json)
    if shards is None and not shard:
        shards = 1
    settings = encoding_settings(session, 0, keep, label, images, "parquet", scores=True)
    sharing = Sharing(shards, shard, processes, ray, backend, device)
    in_shards(session, "score", output, images, None, sharing, settings, "parquet", json)


@app.command()
def shards(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a job with --shards.")],
    join: Annotated[
        Path | None,
        typer.Option(help="Also join whole shards of samples (.npz) into one .npz, as FID tools read it."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Count and verify the shards of a job, and name what is missing; exit 1 if any is.

    Example: hflow-rt shards scores/
    """
    from hflow_rt.runtime.shard_files import join_arrays
    from hflow_rt.runtime.shards import forget, read_job, shard_name, state

    job = read_job(output)
    if join is not None and job.files != "npz":
        raise DataError(f"shards of .npz are joined, and these are .{job.files}; omit --join")
    found = state(output, job)
    for number in found.damaged:
        forget(output, job, number)
    if json:
        print_json(
            job.model_dump()
            | {"done": len(found.done), "missing": list(found.missing), "damaged": list(found.damaged)}
            | {"images": found.images, "refused": found.refused}
        )
    else:
        say(f"{job.kind} by {job.family}: {len(found.done)} of {job.shards} shards whole, {found.images:,} images")
        if found.refused:
            say(f"images that could not be used: {found.refused:,}; their rows say why")
        for what, numbers in (("missing", found.missing), ("damaged, to be done again", found.damaged)):
            if numbers:
                say(f"{what}: {_ranges(numbers)}")
    if len(found.done) < job.shards:
        if not json:
            say_next(continued(job, output, Path("IMAGES"), _bundled(job.model)))
        raise typer.Exit(1)
    if join is not None:
        count = join_arrays([output / shard_name(job, number) for number in found.done], join)
        if not json:
            say(f"{count:,} images: {join}")


def _ranges(numbers: Sequence[int]) -> str:
    """For example `3, 7-12`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in found)


def _bundled(model: str) -> Path:
    """The name of the bundled model of this identity, or a place for where another is."""
    from hflow_rt.assets import bundled_models, pretrained
    from hflow_rt.manifest import read_manifest

    known = {read_manifest(pretrained(name)).identity(): name for name in bundled_models()}
    return Path(known.get(model, "MODEL"))
