"""`hflow-rt heatmap`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.common import (
    LATENTS,
    BackendOption,
    DeviceOption,
    ImagesArgument,
    JsonOption,
    LabelOption,
    ModelOption,
    SeedOption,
    StdOption,
    named,
    open_session,
    starting_points,
)
from hflow_rt.cli.terminal import print_json, say, say_next, tracked


@app.command(rich_help_panel=LATENTS)
def heatmap(
    images: ImagesArgument = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp).")] = Path(
        "heatmap.png"
    ),
    number: Annotated[int, typer.Option("-n", "--number", help="How many samples, or of the images.")] = 1,
    draws: Annotated[int, typer.Option(help="Redraws of each latent.")] = 32,
    redraw_std: Annotated[float, typer.Option(help="Std of the redraws, as a multiple of the prior's.")] = 1.0,
    seed: SeedOption = 0,
    std: StdOption = None,
    label: LabelOption = None,
    backend: BackendOption = "onnx",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Show which pixels each latent decides: redraw one at a time and colour how much the image changes.

    Example: hflow-rt heatmap -n 4 --draws 32 -o heatmap.png
    """
    import numpy as np

    from hflow_rt.runtime import explore
    from hflow_rt.runtime.pictures import (
        Row,
        check_picture_name,
        check_picture_size,
        coloured,
        heat_colours,
        save_image,
        table,
        table_size,
        to_uint8,
    )

    check_picture_name(output)
    session = open_session(model, backend, device, quiet=json)
    if not images:
        check_picture_size(output, *table_size(len(session.latent_shapes) + 1, number, session.resolution))
    bases, pixels, latents = starting_points(session, images, number, seed, std, label)
    names = list(session.latent_shapes)
    jobs = [(index, name) for index in range(len(bases)) for name in names]
    first = len(bases)  # redraws are images after all bases, so that none is its own redraw
    maps = np.stack(
        [
            explore.heat_map(
                session, explore.select(latents, index), name, draws, std=redraw_std, seed=seed, first=first
            )
            for index, name in tracked(jobs, len(jobs) * draws, lambda job: draws, "redrawing")
        ]
    ).reshape(len(bases), len(names), session.resolution, session.resolution)
    top = float(maps.max())
    colours = heat_colours(maps / (top or 1.0))
    captions = [f"{name}\n{'x'.join(map(str, shape))}" for name, shape in session.latent_shapes.items()]
    shown = np.concatenate([coloured(to_uint8(pixels))[:, None], colours], axis=1)
    rows = [Row(row, captions=[Path(base).name, *captions]) for base, row in zip(bases, shown, strict=True)]
    scale = np.linspace(1, 0, session.resolution)[:, None].repeat(session.resolution, 1)
    rows[0] = Row(
        np.concatenate([shown[0], heat_colours(scale)[None]]), captions=[*rows[0].captions, f"scale\n0 .. {top:.3f}"]
    )
    save_image(output, table(rows))
    means = [dict(zip(names, map(float, row.mean((1, 2))), strict=True)) for row in maps]
    if json:
        report = [{"image": base, "mean_std": mean} for base, mean in zip(bases, means, strict=True)]
        print_json(
            {"output": str(output), "draws": draws, "redraw_std": redraw_std, "largest_std": top, "maps": report}
        )
        return
    for name in names:
        say(f"{name}: mean std {np.mean([mean[name] for mean in means]):.4f} (pixels in 0 .. 1)")
    say(f"{len(bases)} x {len(names)} maps of {draws} redraws, the largest std {top:.3f}: {output}")
    say_next(f"hflow-rt zeroing{named(model, '--model ')} -o zeroing.png")
