"""`hflow-rt heatmap`."""

from pathlib import Path
from typing import Annotated

import typer

from hflow_rt.cli.latents import Asked, latent_command
from hflow_rt.cli.options import ImagesArgument
from hflow_rt.cli.terminal import tracked


@latent_command("heatmap.png", "number", "seed", "std", "label", number=1)
def heatmap(
    asked: Asked,
    images: ImagesArgument = None,
    draws: Annotated[int, typer.Option(help="Redraws of each latent.")] = 32,
    redraw_std: Annotated[
        float | None,
        typer.Option(
            help="Std of the redraws, as a multiple of the prior's; 1 where there is any.", show_default=False
        ),
    ] = None,
) -> None:
    """Show which pixels each latent decides: redraw one at a time and colour how much the image changes.

    Example: hflow-rt heatmap -n 4 --draws 32 -o heatmap.png
    """
    import numpy as np

    from hflow_rt.runtime.images.pictures import Row, coloured, heat_colours, save_image, table, to_uint8
    from hflow_rt.runtime.latents import latent_views as views

    session = asked.open_for_picture()
    if not images:
        asked.check_table(session, len(session.levels) + 1, asked.number)
    start = asked.start(session, images)
    names, first = session.levels, len(start.names)
    jobs = [(views.select(start.latents, index), name) for index in range(first) for name in names]
    maps = np.stack(
        [  # redraws are images after all bases, so that none is its own redraw
            views.heat_map(session, base, name, draws, std=redraw_std, seed=asked.seed, first=first)
            for base, name in tracked(jobs, len(jobs) * draws, lambda job: draws, "redrawing")
        ]
    ).reshape(first, len(names), session.resolution, session.resolution)
    top = float(maps.max())
    captions = [f"{name}\n{'x'.join(map(str, session.input_shapes[name]))}" for name in names]
    shown = np.concatenate([coloured(to_uint8(start.pixels))[:, None], heat_colours(maps / (top or 1.0))], axis=1)
    rows = [Row(row, captions=[Path(base).name, *captions]) for base, row in zip(start.names, shown, strict=True)]
    scale = np.linspace(1, 0, session.resolution)[:, None].repeat(session.resolution, 1)
    rows[0] = Row(
        np.concatenate([shown[0], heat_colours(scale)[None]]), captions=[*rows[0].captions, f"scale\n0 .. {top:.3f}"]
    )
    save_image(asked.output, table(rows))
    means = [dict(zip(names, map(float, row.mean((1, 2))), strict=True)) for row in maps]
    lines = [f"{name}: mean std {np.mean([mean[name] for mean in means]):.4f} (pixels in 0 .. 1)" for name in names]
    lines.append(f"{first} x {len(names)} maps of {draws} redraws, the largest std {top:.3f}: {asked.output}")
    each = [{"image": base, "mean_std": mean} for base, mean in zip(start.names, means, strict=True)]
    report = {"draws": draws, "redraw_std": redraw_std, "largest_std": top, "maps": each}
    asked.finish(report, lines, f"hflow-rt zeroing{asked.again} -o zeroing.png")
