"""A bundle as a model repository of NVIDIA's Triton Inference Server: `export --engine triton-repo`.

Every graph but those of a loop becomes a model `NAME_GRAPH`, for the server's ONNX Runtime or TensorRT backend. What a
session does beyond a graph is a model of its Python backend: `NAME_sample` draws images as `hflow-rt sample` does, and
a route that is a loop is `NAME_forward` or `NAME_inverse`. A model that is there gets another version. A server may
watch: what it sees is whole at any time.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hflow_rt.choices import Route
from hflow_rt.errors import BundleError, ConfigError
from hflow_rt.files import atomic_directory, atomic_file, is_folder, unusable
from hflow_rt.manifest import MANIFEST, Engines, Graph, Loop, Tensor, graphs_of
from hflow_rt.runtime.bundle import BUNDLE, Bundle
from hflow_rt.runtime.served import DEFAULTS, ROUTE
from hflow_rt.runtime.session import Session, open_bundle

__all__ = ["model_name", "write_repository"]

_DELAY = 500  # microseconds that a request waits for others to be run together
_CONFIG = "config.pbtxt"
_WRITTEN = "# as hflow-rt wrote it: "  # and the hash of the rest
_ONNX = "model.onnx"  # a folder of this name holds a graph and its constants
_PYTHON = '''"""The bundle beside this file, run by a session of ours."""

from hflow_rt.runtime.served import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_ROUTES: tuple[Route, ...] = ("forward", "inverse")
Served = Literal["onnx", "trt"]


def model_name(bundle: Bundle) -> str:
    """What models are called before the underscore: the run or the bundle, in letters that every server takes."""
    folder = bundle.path.parent if bundle.path.name == BUNDLE else bundle.path
    return re.sub(r"[^A-Za-z0-9.-]", "-", folder.resolve().name).strip(".-") or bundle.manifest.family


def write_repository(bundle: Bundle, folder: Path, served: Served = "onnx", name: str | None = None) -> dict[str, int]:
    """Write the models into `folder`, which may hold others; versions by the models' names.

    Raises `BundleError` for files that are not whole or lack, `ConfigError` for engines that the server cannot run.
    """
    manifest, name = bundle.manifest, name or model_name(bundle)
    engines = _engines(bundle) if served == "trt" else []
    looped = {graph for way in manifest.routes.values() if isinstance(way, Loop) for graph in way.graphs}
    graphs = {key: graph for key, graph in manifest.graphs.items() if key not in looped}  # which are nothing alone
    graphs = {key: graph for key, graph in graphs.items() if served == "onnx" or key in engines[0].plans}
    folder.mkdir(parents=True, exist_ok=True)
    versions: dict[str, int] = {}
    for key, graph in graphs.items():
        model = folder / f"{name}_{key}"
        largest = graph.batch[1] if served == "onnx" else min(one.batch[2] for one in engines)
        plans = {capability: one.plans[key].file for one in engines for capability in one.capabilities}
        with _version(model, _config(model.name, graph, largest, plans)) as (made, versions[model.name]):
            if served == "onnx":
                (made / _ONNX).mkdir()
                shutil.copyfile(bundle.graph(key), made / _ONNX / _ONNX)
                for file in graph.weights:
                    shutil.copyfile(bundle.path / file, made / _ONNX / file)
            for file in set(plans.values()):
                shutil.copyfile(bundle.file(file), made / _plan(file))
    models = {"sample": _sample_config(f"{name}_sample")}
    if loops := [route for route in _ROUTES if isinstance(manifest.routes.get(route), Loop)]:
        with open_bundle(bundle, "onnx", "cpu") as session:
            models |= {route: _route_config(f"{name}_{route}", session, route) for route in loops}
    for route, config in models.items():
        model = folder / f"{name}_{route}"
        with _version(model, config) as (made, versions[model.name]):
            (made / "model.py").write_text(_PYTHON)
            for file in (MANIFEST, *manifest.run_files):
                (made / BUNDLE / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.path / MANIFEST if file == MANIFEST else bundle.file(file), made / BUNDLE / file)
    with atomic_file(folder / f"{name}.{MANIFEST}") as temporary:
        temporary.write_text(manifest.dump())
    return versions


@contextmanager
def _version(model: Path, settings: str) -> Iterator[tuple[Path, int]]:
    """A folder to fill, and the number of the version that it becomes when it is whole.

    Settings that somebody has changed stay as they are. Raises `ConfigError` where they are of another backend.
    """
    config = f"{_WRITTEN}{_digest(settings)}\n{settings}"
    if not is_folder(model):
        try:
            with tempfile.TemporaryDirectory(prefix=".", dir=_unwatched(model.parent)) as temporary:
                made = Path(temporary) / model.name
                (made / "1").mkdir(parents=True)
                yield made / "1", 1
                (made / _CONFIG).write_text(config)
                made.rename(model)
        except OSError as error:
            raise unusable(model, error, "write") from error
        return
    there = (model / _CONFIG).read_text()
    first, _, rest = there.partition("\n")
    ours = first == f"{_WRITTEN}{_digest(rest)}"
    backend = next(line for line in settings.splitlines() if line.startswith(("backend:", "platform:")))
    if not ours and backend not in there:
        raise ConfigError(f"{model / _CONFIG} was changed and is not of {backend}; write into another folder")
    number = 1 + max((int(path.name) for path in model.iterdir() if path.name.isdigit()), default=0)
    with atomic_directory(model / str(number), replace=False) as made:
        yield made, number
    if ours:
        with atomic_file(model / _CONFIG) as temporary:
            temporary.write_text(config)


def _unwatched(folder: Path) -> Path:
    """Where a model is made: beside the repository, because a server that watches it takes every folder for a model.

    In it where that is another disk, or not ours.
    """
    parent = folder.resolve().parent
    same = parent.stat().st_dev == folder.stat().st_dev
    return parent if same and os.access(parent, os.W_OK) else folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _engines(bundle: Bundle) -> list[Engines]:
    """The newest TensorRT engines for each compute capability. Raises `BundleError`, `ConfigError`."""
    found = list(bundle.manifest.engines.values())
    if not found:
        raise BundleError(f"{bundle.path} has no TensorRT engines; build them with 'hflow-rt export --engine trt'")
    usable = [one for one in found if one.flavor == "tensorrt"]
    if not usable:
        raise ConfigError(
            "these engines are of TensorRT for RTX, whose plans the server's TensorRT cannot read; build others with"
            " 'hflow-rt export --engine trt --flavor tensorrt', or serve the graphs with --serve onnx"
        )
    newest = {capability: one for one in usable for capability in one.capabilities}
    found = [one for one in usable if one in newest.values()]
    if any(one.plans.keys() != found[0].plans.keys() or one.batch[0] > 1 for one in found):
        raise ConfigError(
            "engines that are served together must be of the same graphs and take batches from 1 on; build them again"
            " with 'hflow-rt export --engine trt', or serve the graphs with --serve onnx"
        )
    return found


def _plan(file: str) -> str:
    """What a plan is called beside others of the same graph."""
    return file.replace("/", "-")


def _config(name: str, graph: Graph, largest: int, plans: Mapping[str, str]) -> str:
    """The settings of a model: its tensors without the batch, which the server makes of what waits."""
    backend: dict[str, Any] = {"backend": "onnxruntime"}
    if plans:
        file = _plan(next(iter(plans.values())))
        backend = {"platform": "tensorrt_plan", "default_model_filename": file}
        backend["cc_model_filenames"] = [{"key": cc, "value": _plan(plan)} for cc, plan in plans.items()]
    defaults = {one.name: one.default for one in graph.inputs if one.default is not None}
    parameters = {DEFAULTS: json.dumps(defaults)}
    if not plans:
        parameters["intra_op_thread_count"] = "0"  # as many as there are cores
    zeros = {"data_type": _Raw("TYPE_FP32"), "zero_data": True}
    warm = [{"key": one.name, "value": zeros | {"dims": list(one.shape) or [1]}} for one in graph.inputs]
    return _text(
        {"name": name}
        | backend
        | {
            "max_batch_size": largest,
            "input": [_tensor(tensor) for tensor in graph.inputs],
            "output": [_tensor(tensor) for tensor in graph.outputs],
            "dynamic_batching": {"max_queue_delay_microseconds": _DELAY},
            "instance_group": [{"count": 1, "kind": _Raw("KIND_AUTO")}],
            "model_warmup": [{"name": "zeros", "batch_size": 1, "inputs": warm}],
        }
        | {"parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()]}
    )


def _tensor(tensor: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"name": tensor.name, "data_type": _Raw("TYPE_FP32"), "dims": list(tensor.shape) or [1]}
    return found | ({} if tensor.shape else {"reshape": {"shape": []}})  # one number an image


def _sample_config(name: str) -> str:
    """The settings of the model that draws: a request is one call of `sample`."""
    words = {"seed": "TYPE_UINT64", "count": "TYPE_INT32", "first": "TYPE_UINT64", "steps": "TYPE_INT32"}
    words |= {"std": "TYPE_STRING", "control": "TYPE_STRING", "label": "TYPE_STRING"}
    return _python_config(name, "sample", {}, words, {"image": (-1, -1, -1)})


def _route_config(name: str, session: Session, route: str) -> str:
    """The settings of a loop: a request is one call of the session's method."""
    manifest = session.manifest
    image: dict[str, tuple[int, ...]] = {"image": (manifest.channels, manifest.resolution, manifest.resolution)}
    if route == "forward":
        return _python_config(name, route, session.input_shapes, {"control": "TYPE_STRING"}, image)
    conditions: dict[str, tuple[int, ...]] = {key: (len(options),) for key, options in session.conditions.items()}
    latents = {key: shape for key, shape in session.input_shapes.items() if key not in conditions}
    graphs = [manifest.graphs[graph] for graph in graphs_of(manifest.routes["inverse"])]
    scores: dict[str, tuple[int, ...]] = {
        one.name: () for graph in graphs for one in graph.outputs if one.role == "score"
    }
    words = {"control": "TYPE_STRING", "seed": "TYPE_UINT64", "first": "TYPE_UINT64"}
    return _python_config(name, route, image | conditions, words, latents | scores)


def _python_config(
    name: str,
    route: str,
    arrays: Mapping[str, tuple[int, ...]],
    words: Mapping[str, str],
    outputs: Mapping[str, tuple[int, ...]],
) -> str:
    """The settings of a model of the Python backend: how many images there are it is told, so there is no batch.

    arrays, outputs: shapes without the images. words: types of what may be left out; texts of some may be several.
    """
    listed = ("std", "control")  # as the command takes them, repeated
    floats = _Raw("TYPE_FP32")
    given: list[dict[str, Any]] = [
        *({"name": key, "data_type": floats, "dims": [-1, *shape]} for key, shape in arrays.items()),
        *(
            {"name": key, "data_type": _Raw(kind), "dims": [-1 if key in listed else 1], "optional": True}
            for key, kind in words.items()
        ),
    ]
    return _text(
        {
            "name": name,
            "backend": "python",
            "max_batch_size": 0,
            "input": given,
            "output": [{"name": key, "data_type": floats, "dims": [-1, *shape]} for key, shape in outputs.items()],
            "instance_group": [{"count": 1, "kind": _Raw("KIND_AUTO")}],
            "parameters": [{"key": ROUTE, "value": {"string_value": route}}],
        }
    )


class _Raw(str):
    """A name of the protocol's, which is written without quotes."""


def _text(message: Mapping[str, Any], indent: str = "") -> str:
    """A protobuf message as text."""
    return "".join(_field(key, value, indent) for key, value in message.items())


def _field(key: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        return f"{indent}{key} {{\n{_text(value, indent + '  ')}{indent}}}\n"
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value) and value:
        return "".join(_field(key, one, indent) for one in value)
    said = value if isinstance(value, _Raw) else json.dumps(value)
    return f"{indent}{key}: {said}\n"
