"""Add TensorRT engines to a bundle, for TensorRT and for TensorRT for RTX.

Precision is in the graph: networks are strongly typed, and no builder flag changes a number type. Each plan is built by
a process of its own, under a temporary name; the bundle gets all of them or stays as it was.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from hflow_rt.errors import BackendUnavailable, BundleError, ConfigError, EngineMismatch
from hflow_rt.export.tensorrt_build import BuildRequest, difference, prepared
from hflow_rt.files import atomic_directory, atomic_file, removed_if_empty, sha256
from hflow_rt.manifest import (
    MANIFEST,
    BundledFile,
    Engines,
    Graph,
    Manifest,
    Plan,
    graph_sha256,
    read_manifest,
)
from hflow_rt.runtime.bundle import Bundle
from hflow_rt.runtime.engines.cuda import Gpu, chosen_gpu
from hflow_rt.runtime.engines.plans import (
    FLAVORS,
    PLANS,
    Flavor,
    Product,
    choose_refittable,
    plan_file,
    plans_key,
    product,
)

__all__ = ["add_engines", "parse_batch", "parse_capabilities", "refit_engines", "refittable", "target"]

BATCH = (1, 16, 64)
_TIMING_CACHE = "timing.cache"
_COMMAND = [sys.executable, "-P", "-m", "hflow_rt.export.tensorrt_build"]
# What one plan of TensorRT for RTX serves where nobody names a GPU: all generations since Ampere. With Turing among
# them, matrix products would be convolutions for all (see `tensorrt_build`).
_PORTABLE = ("8.0", "8.6", "8.9", "12.0")
_ANEW = "omit --update-weights to build anew"


def add_engines(
    bundle: Bundle,
    flavor: Flavor | None = None,
    capabilities: Sequence[str] | None = None,
    batch: tuple[int, int, int] | None = None,
    workspace: int | None = None,
    graphs: Sequence[str] | None = None,
    refit: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    detail: Callable[[str], None] = lambda text: None,
) -> tuple[Bundle, str]:
    """Build plans of `graphs`, by default of all, into `trt/KEY/`; the bundle as it is then, and the key.

    flavor: as of `product`. capabilities: GPUs to build for, such as `8.9`, with TensorRT for RTX; else this machine's
    GPU, or without one `_PORTABLE`. batch: smallest, likeliest and largest of one call, see `parse_batch`.
    workspace: limit on temporary memory, MiB. refit: so that their weights can be replaced, see `refit_engines`.
    progress: told of each step; detail: how far each has come, several times a second. Where the GPU here can load
    the plans, their layers are listed as it has them. Engines with the same key are replaced. Raises
    `BackendUnavailable`, `ConfigError`, `BundleError`.
    """
    if bundle.manifest.tuning != "any":
        raise BundleError(
            f"the graphs of {bundle.path} were written for a {bundle.manifest.tuning.upper()}; export them for GPUs"
            " with --tune any, to another --out if this bundle is to stay"
        )
    built_by, gpu, capabilities = target(flavor, capabilities, refit)
    names = [name for name in bundle.manifest.graphs if graphs is None or name in graphs]
    if not names:
        raise BundleError(f"{bundle.path} has no such graphs; export them with 'hflow-rt export'")
    batch = _batch(batch, [bundle.manifest.graphs[name] for name in names])
    digests = {name: graph_sha256(bundle.manifest, name) for name in names}
    gpu_name = gpu.name if built_by.flavor == "tensorrt" and gpu is not None else None
    key = plans_key(
        built_by.flavor, built_by.version, gpu_name, capabilities, bundle.manifest.precision, batch, digests, refit
    )
    plans: dict[str, Plan] = {}
    with removed_if_empty(bundle.path / PLANS), atomic_directory(bundle.path / PLANS / key) as folder:
        cache = _start_timing_cache(bundle, built_by, gpu_name, folder)
        for name in names:
            progress(f"building {name}.plan with {built_by.title} for {', '.join(capabilities)}")
            request = BuildRequest(
                module=FLAVORS[built_by.flavor].module,
                onnx=bundle.graph(name),
                plan=folder / f"{name}.plan",
                layers=folder / f"{name}.layers.jsonl",
                batch=batch,
                capabilities=capabilities if built_by.flavor == "rtx" else None,
                workspace=workspace,
                timing_cache=cache,
                refittable=refit,
                load=gpu is not None and gpu.capability in capabilities,
            )
            found = _run(request, f"{built_by.title} cannot build {request.onnx}", detail)
            place = f"{PLANS}/{key}"
            plans[name] = Plan(
                file=f"{place}/{name}.plan", layers=f"{place}/{name}.layers.jsonl", onnx=digests[name], **found
            )
        files = _described(folder, f"{PLANS}/{key}")
    made = Engines(
        flavor=built_by.flavor,
        version=built_by.version,
        gpu=gpu_name,
        capabilities=capabilities,
        batch=batch,
        workspace=workspace,
        refittable=refit,
        plans=plans,
        timing_cache=f"{PLANS}/{key}/{_TIMING_CACHE}" if cache is not None else None,
    )
    manifest = read_manifest(bundle.path)  # building takes a while, in which others may have written
    if {name: graph_sha256(manifest, name) for name in names if name in manifest.graphs} != digests:
        raise BundleError(f"{bundle.path} was exported again while its engines were built; build them again")
    manifest = manifest.model_copy(
        update={
            "files": manifest.files | files,
            "engines": {k: v for k, v in manifest.engines.items() if k != key} | {key: made},
        }
    )
    return _written(bundle.path, manifest), key


def target(
    flavor: Flavor | None, capabilities: Sequence[str] | None, refit: bool
) -> tuple[Product, Gpu | None, tuple[str, ...]]:
    """What builds, the GPU here and the compute capabilities to build for, of arguments as of `add_engines`.

    Raises `BackendUnavailable`, `ConfigError`.
    """
    gpu = chosen_gpu()
    built_by = product(flavor, gpu)
    chosen = _capabilities(built_by, gpu, capabilities)
    if refit:
        _check_refit(built_by, gpu, chosen)
    return built_by, gpu, chosen


def refittable(bundle: Bundle, flavor: Flavor | None = None) -> str:
    """The key of the plans of `bundle` that `refit_engines` gives other weights, once it has a GPU that can load them.

    flavor: as of `product`; else that of the newest such plans. Raises `BackendUnavailable`, `EngineMismatch`,
    `BundleError`.
    """
    newest = next((e for e in reversed(bundle.manifest.engines.values()) if e.refittable), None)
    gpu = chosen_gpu()
    if gpu is None:
        raise BackendUnavailable(
            "replacing the weights of an engine loads it, which needs an NVIDIA GPU, and none was found here; run this"
            f" command on the machine with the GPU, or {_ANEW}"
        )
    return choose_refittable(bundle, product(flavor or (newest.flavor if newest else None), gpu), gpu)


def refit_engines(
    bundle: Bundle, old: Bundle, key: str, progress: Callable[[str], None] = lambda text: None
) -> tuple[Bundle, str]:
    """Put the plans `key` of `old` into `bundle` with the weights of its graphs, without building them again.

    bundle: graphs like those of `old`, other weights. Returns it as it is then, and the key there. Raises
    `EngineMismatch` where the graphs differ in more than weights, `BundleError` where TensorRT refuses.
    """
    engines = old.manifest.engines[key]
    for name in engines.plans:
        if name not in bundle.manifest.graphs:
            raise EngineMismatch(f"the new graphs must be those of {old.path} and lack {name}; {_ANEW}")
        if differs := difference(prepared(old.graph(name)), prepared(bundle.graph(name))):
            raise EngineMismatch(f"{name} must be the graph of {old.path} but for its weights, and {differs}; {_ANEW}")
    digests = {name: graph_sha256(bundle.manifest, name) for name in engines.plans}
    precision = bundle.manifest.precision
    new = plans_key(
        engines.flavor, engines.version, engines.gpu, engines.capabilities, precision, engines.batch, digests, True
    )
    place, plans = f"{PLANS}/{new}", {}
    title = f"{FLAVORS[engines.flavor].title} {engines.version}"
    with removed_if_empty(bundle.path / PLANS), atomic_directory(bundle.path / PLANS / new) as folder:
        for name in engines.plans:
            progress(f"giving {name}.plan the new weights")
            request = BuildRequest(
                module=FLAVORS[engines.flavor].module,
                onnx=bundle.graph(name),
                plan=folder / f"{name}.plan",
                layers=folder / f"{name}.layers.jsonl",
                batch=engines.batch,
                capabilities=engines.capabilities if engines.flavor == "rtx" else None,
                old=plan_file(old, key, name),
            )
            found = _run(request, f"{title} cannot refit {request.old}", lambda text: None, _ANEW)
            plans[name] = Plan(
                file=f"{place}/{name}.plan", layers=f"{place}/{name}.layers.jsonl", onnx=digests[name], **found
            )
        if engines.timing_cache is not None:
            (folder / _TIMING_CACHE).write_bytes(old.file(engines.timing_cache).read_bytes())
        files = _described(folder, place)
    made = engines.model_copy(
        update={
            "plans": plans,
            "timing_cache": engines.timing_cache and f"{place}/{_TIMING_CACHE}",
            "parity": None,
            "verified": False,
        }
    )
    manifest = bundle.manifest.model_copy(
        update={"files": bundle.manifest.files | files, "engines": bundle.manifest.engines | {new: made}}
    )
    return _written(bundle.path, manifest), new


def _described(folder: Path, place: str) -> dict[str, BundledFile]:
    """What the manifest says of the files in `folder`, which is `place` in the bundle."""
    return {
        f"{place}/{path.name}": BundledFile(sha256=sha256(path), bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
    }


def _written(folder: Path, manifest: Manifest) -> Bundle:
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.dump())
    return Bundle(folder, manifest)


def parse_batch(text: str) -> tuple[int, int, int]:
    """`MIN:OPT:MAX`, or one number for engines of just that batch. Raises `ConfigError`."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdecimal() and len(part) < 9 for part in parts):
        raise ConfigError(f"--batch must be MIN:OPT:MAX, such as 1:16:64, or one number, not '{text}'")
    smallest, likely, largest = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    if not 1 <= smallest <= likely <= largest:
        raise ConfigError(f"--batch MIN:OPT:MAX must rise from 1, not '{text}'")
    return smallest, likely, largest


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Compute capabilities such as `8.6,8.9`, each once, in rising order. Raises `ConfigError`."""
    parts = {part.strip() for part in text.split(",")}
    if not all(re.fullmatch(r"[1-9][0-9]?\.[0-9]", part) for part in parts):
        raise ConfigError(f"--compute-capability must be numbers such as 8.6,8.9,12.0, not '{text}'")
    return tuple(sorted(parts, key=float))


def _capabilities(built_by: Product, gpu: Gpu | None, wanted: Sequence[str] | None) -> tuple[str, ...]:
    if built_by.flavor == "tensorrt":
        if gpu is None:
            raise BackendUnavailable(
                "TensorRT builds on the GPU that will run the engine and there is none here; run this command there,"
                " or build ahead of time for an RTX GPU with --flavor rtx"
            )
        if wanted is not None and tuple(wanted) != (gpu.capability,):
            raise ConfigError(
                f"TensorRT builds for the GPU here, {gpu.name} with compute capability {gpu.capability}, not for"
                f" {', '.join(wanted)}; omit --compute-capability, or use --flavor rtx"
            )
        return (gpu.capability,)
    known = sorted(
        (f"{name[2:-1]}.{name[-1]}" for name in built_by.api.ComputeCapability.__members__ if name.startswith("SM")),
        key=float,
    )
    chosen = tuple(wanted) if wanted is not None else _PORTABLE if gpu is None else (gpu.capability,)
    if unknown := [capability for capability in chosen if capability not in known]:
        whose = f" of {gpu.name}" if gpu is not None and wanted is None else ""
        instead = "use TensorRT ('hflow-rt[trt]') there" if unknown[0] in ("9.0", "10.0") else "choose among these"
        raise ConfigError(
            f"{built_by.title} builds for compute capabilities {', '.join(known)}, not for {', '.join(unknown)}{whose};"
            f" {instead}"
        )
    return chosen


def _check_refit(built_by: Product, gpu: Gpu | None, capabilities: Sequence[str]) -> None:
    """Refuse what TensorRT for RTX 1.7 fails at, tried, with a word about its compiler that explains nothing."""
    if built_by.flavor != "rtx":
        return
    if gpu is None:
        raise BackendUnavailable(
            f"{built_by.title} builds engines whose weights can be replaced on a machine with a GPU only, and there is"
            " none here; run this there, or omit --refit and build again for new weights, which takes seconds"
        )
    if len(capabilities) != 1:
        raise ConfigError(
            f"--refit is for one compute capability, not for {', '.join(capabilities)}: {built_by.title} has no"
            " engines for several whose weights can be replaced; name one, or omit --refit"
        )


def _batch(wanted: tuple[int, int, int] | None, graphs: Sequence[Graph]) -> tuple[int, int, int]:
    low, high = max(graph.batch[0] for graph in graphs), min(graph.batch[1] for graph in graphs)
    chosen = wanted or (max(low, BATCH[0]), min(high, BATCH[1]), min(high, BATCH[2]))
    if not low <= chosen[0] <= chosen[2] <= high:
        raise ConfigError(f"--batch must lie within the graphs' {low} to {high}, not {':'.join(map(str, chosen))}")
    return chosen


def _start_timing_cache(bundle: Bundle, built_by: Product, gpu: str | None, folder: Path) -> Path | None:
    """Where this build's timings go, begun with those of the newest build on this GPU. TensorRT for RTX has none."""
    if built_by.flavor == "rtx":
        return None
    cache = folder / _TIMING_CACHE
    for engines in reversed(bundle.manifest.engines.values()):
        if engines.timing_cache is not None and (engines.version, engines.gpu) == (built_by.version, gpu):
            with contextlib.suppress(BundleError):  # a cache that is gone or changed only costs time
                cache.write_bytes(bundle.file(engines.timing_cache).read_bytes())
                break
    return cache


def _run(request: BuildRequest, failure: str, detail: Callable[[str], None], hint: str = "") -> dict[str, Any]:
    """Build in a process of its own; what it says of the result.

    Raises `BundleError` that begins with `failure` and ends with `hint`.
    """
    hint = hint and f"; {hint}"
    phase = "starting"
    result: dict[str, Any] = {}
    with tempfile.TemporaryFile() as noise, _process(_COMMAND, noise) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request.model_dump_json())
        process.stdin.close()
        for line in process.stdout:
            event = json.loads(line)
            if "error" in event:
                raise BundleError(f"{failure}: {event['error']}{hint}")
            if "phase" in event:
                phase = event["phase"]
                detail(f"{request.plan.name}: {phase.lower()}, {event['done']} of {event['total']}")
            else:
                result = event
        code = process.wait()
        noise.seek(0)
        said = noise.read().decode(errors="replace").strip().splitlines()
    if code or not result:
        last = f": {said[-1]}" if said else ""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise BundleError(f"{failure}: its process {how} while {phase.lower()}{last}{hint}")
    return result


@contextlib.contextmanager
def _process(command: Sequence[str], noise: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """A child that does not outlive the block: Ctrl-C is the parent's, which then ends it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=noise,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()
