"""Reports of an evaluation: as plain JSON values, and as lines to read."""

from __future__ import annotations

from typing import Any

from hflow_rt.data.selection import Selection
from hflow_rt.evaluation.bits import BitsReport, BoundBits
from hflow_rt.evaluation.coverage import Likeness
from hflow_rt.evaluation.distance import DistanceReport
from hflow_rt.evaluation.figures import Estimate
from hflow_rt.evaluation.path_length import PathLength

__all__ = ["about_data", "bits_lines", "distance_lines", "path_line"]


def about_data(chosen: Selection) -> dict[str, Any]:
    """Which images, how they were split, and which of them were not used, as plain JSON values."""
    return {
        "split": chosen.split,
        "data": chosen.source,
        "images": len(chosen),
        "data_hash": chosen.images.hash,
        "data_split": chosen.images.split_by,
        "skipped": chosen.images.unused,
    }


def bits_lines(found: BitsReport, chosen: Selection, metadata: dict[str, Any], seed: int, draws: int) -> list[str]:
    """Every bound of `chosen` with a table of its parts; metadata: of the model file."""
    lines = [f"bits/dim of {chosen}, seed {seed}, {draws} draw{'s' if draws > 1 else ''} each:"]
    for name, claim in found.claims.items():
        if name not in found.bounds:
            lines.append(f"{claim.title}: none, because {found.reasons[name]}")
            continue
        bound = found.bounds[name]
        lines += [f"{claim.title}: {_estimate(bound.quoted.estimate)} {bound.quoted.unit}", *_table(bound)]
    lines += [f"{figure.title}: {figure.estimate.mean:.4g}" for figure in found.figures.values()]
    if found.noise:
        scales = (
            f"{name} {scale.std:.4g} ({scale.relative:g} x {scale.spread:.4g})" for name, scale in found.noise.items()
        )
        lines.append(f"noise of the targets, relative x running spread: {', '.join(scales)}")
    return lines + _split_lines(chosen) + _notes(found, chosen, metadata)


def distance_lines(found: DistanceReport, chosen: Selection, drawn: list[str], seed: int) -> list[str]:
    """Both distances to `chosen`, of samples that were drawn with these settings of std and controls."""
    kernel = found.kernel
    lines = [
        f"{found.frechet_name}: {found.frechet:.3f}",
        f"{found.kernel_name}: {kernel.mean:.5f} "
        f"(std {kernel.std:.5f} over {kernel.subsets} subsets of {kernel.subset_size} images)",
        *([] if found.coverage is None else ["precision {:.3f}, recall {:.3f}".format(*found.coverage)]),
        f"most like one of the data, by cosine: samples {_cosines(found.nearest)}"
        + ("" if found.held_out is None else f"; held-out images {_cosines(found.held_out)}"),
        f"{found.samples} samples{' at ' + ' '.join(drawn) if drawn else ''}, seed {seed}, against {chosen}; "
        f"{found.dimensions} features of {found.network}",
    ]
    lines += _split_lines(chosen)
    if found.rank_deficient:
        lines.append(
            f"note: {min(found.samples, found.data)} images cannot fill a covariance of {found.dimensions} dimensions; "
            "compare the first distance only at the same numbers of images"
        )
    return lines


def _cosines(found: Likeness) -> str:
    return f"{found.median:.3f} in the middle, {found.largest:.3f} at most"


def path_line(found: PathLength, network: str) -> str:
    """The path length, and what it is in."""
    pairs = f"{found.pairs} pair{'s' if found.pairs > 1 else ''} of samples"
    return f"path length in {found.space}: {found.mean:.4g} ({pairs}, features of {network})"


def _estimate(value: Estimate, digits: int = 3) -> str:
    error = "" if value.n < 2 else f" ± {value.standard_error:.{digits}f}"
    return f"{value.mean:.{digits}f}{error}"


def _table(bound: BoundBits) -> list[str]:
    """A row a latent; the parts and their sum are in bits per dimension of the image, so that all add up."""
    parts = list(dict.fromkeys(part for latent in bound.latents for part in latent.parts))
    head = ["latent", "size", *(part.replace("_", "-") for part in parts), "sum", "per own dimension"]
    rows = [
        [
            latent.name,
            f"{latent.dimensions:,}",
            *(f"{latent.parts[part].mean:.3f}" if part in latent.parts else "" for part in parts),
            _estimate(latent.total),
            _estimate(latent.own),
        ]
        for latent in bound.latents
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    ]


def _notes(found: BitsReport, chosen: Selection, metadata: dict[str, Any]) -> list[str]:
    notes = []
    if found.noise_unknown:
        notes.append(
            "note: the noise scales of this model were never estimated (all spreads are 1), so bounds may be loose; "
            "'hflow-rt import --images' estimates them"
        )
    if chosen.split == "test" and metadata.get("data") not in (None, chosen.images.hash):
        notes.append("note: the model was trained on another set of images, which may or may not hold these")
    return notes


def _split_lines(chosen: Selection) -> list[str]:
    """Lines that say what split the images, and how many were not used."""
    lines = [] if chosen.split == "all" else [f"of {chosen.source}: {chosen.images.split_by}"]
    return lines + ([f"not used of {chosen.source}: {chosen.images.left_out}"] if chosen.images.unused else [])
