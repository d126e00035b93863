"""The page as a folder for any web host: the browser runs the model, and nothing is asked of anybody else."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hflow_rt.errors import BackendUnavailable, BundleError, DataError
from hflow_rt.files import atomic_directory, is_folder
from hflow_rt.manifest import Graph, Tensor, graphs_of
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.explore.description import described
from hflow_rt.runtime.explore.page import PAGE, POLICY
from hflow_rt.runtime.latents.nearest import find_tensor
from hflow_rt.runtime.session import LATENT_SPACE, Session, open_bundle

__all__ = ["RUNTIME", "find_runtime", "write_static"]

RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_PACKAGE = "onnxruntime-web"
_SHIPPED = PAGE.parent / "web-runtime"  # which `make web` fills
_LARGE = 30 * 2**20
_LICENCE = PAGE.parent / "onnxruntime-web.txt"


def find_runtime(named: Path | None) -> Path:
    """The folder that holds `RUNTIME`: the one named, what ships with the package, or that of npm in this project.

    Raises `BackendUnavailable`, which says how to get it.
    """
    here = Path.cwd()
    beside = [folder / "node_modules" / _PACKAGE / "dist" for folder in (here, *here.parents)]
    for folder in [named] if named is not None else [_SHIPPED, *beside]:
        if all((folder / name).is_file() for name in RUNTIME):
            return folder
    where = f"{named} lacks" if named is not None else "this installation lacks"
    raise BackendUnavailable(
        f"{where} the web runtime ({', '.join(RUNTIME)}); run 'npm install {_PACKAGE}' here, or name its folder dist"
        " with --web-runtime"
    )


def write_static(model: Path, folder: Path, runtime: Path | None = None) -> list[str]:
    """Write the page, the graphs of a bundle or run and the web runtime into a new folder; lines on what it is.

    Raises `BundleError` for a bundle that lacks the way to images, `BackendUnavailable` as `find_runtime` does, and
    `DataError` for a folder that holds anything else.
    """
    from safetensors.numpy import save

    files = find_runtime(runtime)
    bundle = find_bundle(model)
    session = open_bundle(bundle, "onnx", "cpu")
    manifest = bundle.manifest
    web = _web(session)
    sources = {file for graph in web["graphs"].values() for file in (graph["file"], *graph["weights"])}
    tables = {way["schedule"] for way in web["routes"].values() if "schedule" in way} | {*filter(None, [web["bank"]])}
    about = described(session) | {"engine": "browser", "backend": "this browser", "projects": False, "web": web}
    if not about["encodes"]:
        about["encodes_not"] = f"{manifest.absent['inverse']}; a static page cannot search"
    page = {source.name: source for source in PAGE.iterdir() if source.name not in ("server.js", "index.html")}
    copies = page | {source: bundle.file(source) for source in sorted(sources)}
    copies |= {f"ort/{file}": files / file for file in RUNTIME} | {"ort/LICENSE.txt": _LICENCE}
    about["files"] = sorted([*copies, *tables, "index.html", "model.json"])
    _check_ours(folder, about["files"])
    with atomic_directory(folder) as made:
        (made / "ort").mkdir()
        for name, source in copies.items():
            shutil.copyfile(source, made / name)
        for name in tables:  # float32, which is all that the page reads
            (made / name).write_bytes(save(bundle.table(name)))
        (made / "index.html").write_text(_page_alone(), encoding="utf-8")
        (made / "model.json").write_text(json.dumps(about), encoding="utf-8")
    size = sum((folder / source).stat().st_size for source in sources | tables)
    lines = [f"{about['name']}, {size / 2**20:.1f} MB of model: {folder}/"]
    if size > _LARGE:
        lines.append(f"a model beyond {_LARGE // 2**20} MB takes long to load in a browser, and phones may refuse it")
    return lines


def _check_ours(folder: Path, written: Sequence[str]) -> None:
    """Raise `DataError` for a folder that holds anything but what is written, or was when it was made before."""
    if not is_folder(folder):
        return
    ours = set(written)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        ours |= set(json.loads((folder / "model.json").read_text(encoding="utf-8"))["files"])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if others := sorted(there - ours):
        raise DataError(f"{folder} holds {others[0]}, which is not of such a page; choose another folder, or move it")


def _page_alone() -> str:
    """The page with its content policy inside, because a host of files says none."""
    policy = POLICY | {"script-src": "'self' 'wasm-unsafe-eval'", "worker-src": "'self'"}
    said = "; ".join(f"{what} {allowed}" for what, allowed in policy.items())
    first = '<meta charset="utf-8">'
    tag = f'{first}\n<meta http-equiv="Content-Security-Policy" content="{said}">'
    return (PAGE / "index.html").read_text(encoding="utf-8").replace(first, tag)


def _web(session: Session) -> dict[str, Any]:
    """What the browser needs to run the graphs and to do with latents what Python does."""
    manifest = session.manifest
    spaces = {
        name: found.model_dump(include={"into", "back", "decode", "slots"})
        for name, found in manifest.spaces.items()
        if found.into in manifest.graphs and (found.decode in manifest.graphs or found.back in manifest.graphs)
    }
    routes = {
        name: {"graph": way} if isinstance(way, str) else way.model_dump()
        for name, way in manifest.routes.items()
        if all(graph in manifest.graphs for graph in graphs_of(way))
    }
    if "forward" not in routes:
        raise BundleError("this bundle has no way from latents to images; export it with both routes")
    wanted = [graph for name in routes for graph in graphs_of(manifest.routes[name])]
    wanted += [space[way] for space in spaces.values() for way in ("into", "back", "decode")]
    address = find_tensor(session)
    return {
        "routes": routes,
        "graphs": {name: _signature(manifest.graphs[name]) for name in wanted if name in manifest.graphs},
        "spaces": spaces,
        "drawn": [latent.model_dump(include={"name", "shape", "prior_std", "prior"}) for latent in manifest.latents],
        "bank": manifest.bank,
        "joined": {space: session.joined(space) for space in (LATENT_SPACE, *spaces)},
        "ways": {"straight": [*session.conditions, *session.ways("line")], "turned": session.ways("arc")},
        "address": {"space": address.space, "name": address.name},
    }


def _signature(graph: Graph) -> dict[str, Any]:
    return {
        "file": graph.file,
        "weights": graph.weights,
        "inputs": _tensors(graph.inputs),
        "outputs": _tensors(graph.outputs),
    }


def _tensors(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [tensor.model_dump(include={"name", "shape", "role", "default"}) for tensor in tensors]
