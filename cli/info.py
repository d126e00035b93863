"""`hflow-rt info` and `hflow-rt doctor`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hflow_rt.cli.app import app
from hflow_rt.cli.engines import describe_engines, describe_layers
from hflow_rt.cli.opening import locate, named
from hflow_rt.cli.options import JsonOption, ModelArgument
from hflow_rt.cli.terminal import note, print_json, say, say_next, status
from hflow_rt.extras import need_extra
from hflow_rt.files import is_file
from hflow_rt.names import image_size, quoted

if TYPE_CHECKING:
    from hflow_rt.kernels.proof import Standing

_SHOWN = 20  # classes; --json lists all


@app.command()
def info(
    model: ModelArgument = None,
    layers: Annotated[bool, typer.Option("--layers", help="List the layers of TensorRT engines.")] = False,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets of 'train' with their sizes.")] = False,
    models: Annotated[bool, typer.Option("--models", help="List the bundled models.")] = False,
    json: JsonOption = False,
) -> None:
    """Describe a run, a bundle or a model file.

    Example: hflow-rt info runs/my-run
    """
    from hflow_rt.errors import ConfigError
    from hflow_rt.manifest import MANIFEST, MODEL
    from hflow_rt.models.checkpoint import read_metadata
    from hflow_rt.runs import resolve_run
    from hflow_rt.runtime.bundle import BUNDLE, find_bundle

    if presets or models:
        if presets and models:
            raise ConfigError("--presets and --models list different things; give one")
        if model is not None:
            raise ConfigError(f"--{'presets' if presets else 'models'} lists all of them; omit {model}")
        (_list_presets if presets else _list_models)(json)
        return
    path = locate(model, quiet=json)
    if not (is_file(path) or is_file(path / MANIFEST)):
        path = resolve_run(path)
    found: dict[str, Any] = {"path": str(path)}
    weights = path if is_file(path) else path / MODEL
    found["model"] = read_metadata(weights) | {"values": _count(weights)}
    bundle = None
    if any(is_file(folder / MANIFEST) for folder in (path, path / BUNDLE)):
        bundle = find_bundle(path)
        found["bundle"] = {
            "path": str(bundle.path),
            "outdated": bundle.outdated is not None,
            **bundle.manifest.model_dump(mode="json", exclude={"config"}),
        }
        if bundle.outdated is not None:
            note(f"warning: {bundle.outdated}")
    if json:
        print_json(found)
        return
    _print_model(path, found["model"])
    if bundle is None:
        say_next(f"hflow-rt export {quoted(path)}")
        return
    manifest = bundle.manifest
    verdict = "verified" if manifest.verified else "UNVERIFIED"
    verdict += "" if bundle.outdated is None else ", but OF OTHER WEIGHTS"
    tuned = "" if manifest.tuning == "any" else f", for a {manifest.tuning.upper()}"
    say(f"bundle: {bundle.path}, {verdict}, {manifest.precision}{tuned}, opset {manifest.opset}")
    say("  " + ", ".join(f"{name} {version}" for name, version in manifest.tools.items()))
    say(f"  images: {manifest.size}")
    for latent in manifest.latents:
        say(f"  latent {latent.name}: {'x'.join(map(str, latent.shape))}, prior std {latent.prior_std}")
    for name, options in manifest.conditions.items():
        more = f" and {len(options) - _SHOWN} more" if len(options) > _SHOWN else ""
        say(f"  {name}: {', '.join(options[:_SHOWN])}{more}")
    if manifest.std:
        say(f"  samples at std {' '.join(manifest.std)} by default")
    for name, graph in manifest.graphs.items():
        counts = ", ".join(f"{count} {operator}" for operator, count in graph.operators.items())
        size = manifest.files[graph.file].bytes / 1e6
        say(f"  {name}: {sum(graph.operators.values())} nodes, {size:.1f} MB, batch {graph.batch[0]}..{graph.batch[1]}")
        say(f"    {counts}")
        if graph.rewrites:
            say("    rewritten: " + ", ".join(f"{count} {what}" for what, count in graph.rewrites.items()))
    for name in sorted({file for graph in manifest.graphs.values() for file in graph.weights}):
        say(f"  {name}: their constants, {manifest.files[name].bytes / 1e6:.1f} MB")
    for line in (*describe_engines(manifest), *(describe_layers(bundle) if layers else ())):
        say(line)
    say_next(f"hflow-rt sample{named(model)}")


def _count(path: Path) -> int:
    import math

    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _print_model(path: Path, model: dict[str, Any]) -> None:
    say(f"{path}: {model['family']}, {model['values']:,} values")
    for key, value in model.items():
        if key not in ("family", "config", "values"):
            for line in _lines(key, value):
                say(f"  {line}")


def _lines(name: str, value: Any) -> list[str]:
    """A value of a model file in words: a line for each object of plain values; what is empty is passed over."""
    if not isinstance(value, dict):
        return [] if value in (None, [], "") else [f"{name}: {_words(value)}"]
    plain = {key: one for key, one in value.items() if not isinstance(one, dict) and one is not None}
    own = [f"{name}: {', '.join(f'{key} {_words(one)}' for key, one in plain.items())}"] if plain else []
    inner = [line for key, one in value.items() if isinstance(one, dict) for line in _lines(f"{name} {key}", one)]
    return own + inner


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _list_models(json: bool) -> None:
    from dataclasses import asdict

    from hflow_rt.assets import PRETRAINED
    from hflow_rt.assets.listing import listing

    found = listing()
    if json:
        print_json({"models": [asdict(row) for row in found], "default": PRETRAINED})
        return
    for row in found:
        what = f"{row.family:<6} {row.size:>9} {row.parameters / 1e6:8.2f} M parameters {row.bytes / 1e6:6.1f} MB"
        say(f"{row.name:<14} {what}  {row.about}")
    say_next(f"hflow-rt sample --model {found[-1].name}")


def _list_presets(json: bool) -> None:
    """A line for each preset; counting parameters takes torch, but no memory."""
    need_extra("train", "torch")
    from hflow_rt.models.checkpoint import skeleton
    from hflow_rt.training.config import load_config, preset_names

    found: list[dict[str, Any]] = []
    with status(json or not sys.stderr.isatty()) as progress:
        for name in preset_names():
            progress(f"counting {name}")
            config = load_config(name)
            parameters = sum(parameter.numel() for parameter in skeleton(config.family, config.model).parameters())
            found.append(
                {
                    "preset": name,
                    "family": config.family,
                    "resolution": config.resolution,
                    "channels": config.channels,
                    "parameters": parameters,
                }
            )
    if json:
        print_json({"presets": found})
        return
    for row in found:
        side = image_size(row["resolution"], row["channels"])
        say(f"{row['preset']:<22} {row['family']:<6} {side:>9} {row['parameters'] / 1e6:8.2f} M parameters")
    say_next(f"hflow-rt train --preset {found[0]['preset']}")


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Say what this machine can train, export and run, and what is missing.

    Example: hflow-rt doctor
    """
    from dataclasses import asdict

    from hflow_rt.runtime.doctor import facts, findings, kernel_proofs

    about, found = facts(), findings()
    with status(json) as progress:
        proofs = kernel_proofs(progress)
    if json:
        print_json(about | found | {"kernel proofs": [asdict(proof) for proof in proofs]})
        return
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    for name, finding in found.items():
        say(f"  {name}: {finding}")
        if name == "triton kernels":
            _print_proofs(proofs)
    say_next("hflow-rt demo")


def _print_proofs(proofs: "list[Standing]") -> None:
    import itertools

    for where, group in itertools.groupby(proofs, key=lambda proof: proof.environment):
        say(f"    on {where}:")
        for proof in group:
            text = " ".join(filter(None, (proof.state, proof.date))) + (f": {proof.why}" if proof.why else "")
            say(f"      {proof.operator}: {text}")
