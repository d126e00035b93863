"""Build or refit one plan, in a process of its own: `python -m hflow_rt.export.tensorrt_build < REQUEST`.

TensorRT's parser and builder are native code that a bad graph can crash; here that costs an error message. The request
is one JSON object, `BuildRequest`, on stdin. Events come as JSON lines on stdout: `{"phase", "done", "total"}` while
it works, then `{"error"}` or the fields of a `Plan` that are known now. What needs a GPU is in `tensorrt_engine`.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from pydantic import BaseModel

from hflow_rt.export.tensorrt_engine import EngineError, engine_layers, loaded, refitted, write_layers
from hflow_rt.manifest import MODULE
from hflow_rt.runtime.engines.tensorrt import error_logger

__all__ = ["BuildRequest", "difference", "main", "prepared"]

_INTERVAL = 0.2  # seconds between reports of one phase
_SHOWN = 5  # parser errors
_MIB = 1 << 20
# TensorRT for RTX has no float32 matrix product for Turing, but it has convolutions
_NO_GEMM = "7.5"
_WEIGHTS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_SETTINGS = ("Clip", "Pad", "Resize")  # whose further inputs are settings, which are built in


class BuildRequest(BaseModel):
    """What to build: `onnx` into `plan`, its layers into `layers`.

    capabilities: of the GPUs to build for; None where the product builds for the GPU that it runs on. workspace: MiB.
    timing_cache: file to start from, if it is there, and to leave the timings in; None where the product has none.
    refittable: allow other weights later. old: instead of building, give the weights of `onnx` to this plan.
    load: whether there is a GPU that can load the plan, which then lists the layers.
    """

    module: str
    onnx: Path
    plan: Path
    layers: Path
    batch: tuple[int, int, int]
    capabilities: tuple[str, ...] | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    refittable: bool = False
    old: Path | None = None
    load: bool = False


def main() -> None:
    """Build what stdin asks for."""
    # events have stdout for themselves: whatever else prints, such as native code, does so on stderr
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = BuildRequest.model_validate_json(sys.stdin.buffer.read())
    try:
        _say(**(_build(request) if request.old is None else _refit(request, request.old)))
    except EngineError as error:
        _say(error=str(error))


def _build(request: BuildRequest) -> dict[str, Any]:
    started = time.monotonic()
    trt = importlib.import_module(request.module)
    messages: list[str] = []
    logger = error_logger(trt, messages)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what the binding makes of a null pointer: TensorRT finds no CUDA
        raise EngineError("it cannot build on this machine, where it finds no usable GPU") from error
    proto = prepared(request.onnx, convolutions=_NO_GEMM in (request.capabilities or ()))
    modules = _modules(proto)
    _say(phase="parsing", done=0, total=1)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(proto.SerializeToString()):
        raise EngineError(_parser_errors(parser, modules))
    del proto
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # keeps 10 bits of the flow's state, which then cannot be inverted
    if request.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt)
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace * _MIB)
    if request.capabilities is not None:
        config.num_compute_capabilities = len(request.capabilities)
        for index, capability in enumerate(request.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, _member(capability)), index)
    _set_batch(builder, network, config, request.batch)
    cache = None if request.timing_cache is None else _timing_cache(config, request.timing_cache)
    messages.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(messages[0] if messages else "it gives no reason")
    request.plan.write_bytes(plan)
    if cache is not None and request.timing_cache is not None:
        request.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    if request.load:
        with loaded(trt, request.plan, logger, messages) as engine:
            types = write_layers(engine_layers(trt, engine, modules), request.layers)
    else:
        types = write_layers(_network_layers(trt, network, modules), request.layers)
    return {
        "types": types,
        "layers_of": "engine" if request.load else "network",
        "seconds": round(time.monotonic() - started, 1),
    }


def _refit(request: BuildRequest, old: Path) -> dict[str, Any]:
    """Write `old` with the weights of the graph, which must be the one it was built from but for them."""
    started = time.monotonic()
    trt = importlib.import_module(request.module)
    messages: list[str] = []
    logger = error_logger(trt, messages)
    _say(phase="refitting", done=0, total=1)
    proto = prepared(request.onnx, convolutions=_NO_GEMM in (request.capabilities or ()))
    with loaded(trt, old, logger, messages) as engine:
        request.plan.write_bytes(refitted(trt, engine, proto.SerializeToString(), logger, messages))
        types = write_layers(engine_layers(trt, engine, _modules(proto)), request.layers)
    return {
        "types": types,
        "layers_of": "engine",
        "refitted": True,
        "seconds": round(time.monotonic() - started, 1),
    }


def _modules(proto: onnx.ModelProto) -> dict[str, str]:
    """Node to the module of the model that made it."""
    return {node.name: p.value for node in proto.graph.node for p in node.metadata_props if p.key == MODULE}


def prepared(path: Path, convolutions: bool = False) -> onnx.ModelProto:
    """The graph at `path` in one piece, for the parser: constants inside, and those kept in half precision unfolded.

    convolutions: write matrix products with constants as 1x1 convolutions.
    """
    proto = onnx.load(str(path))
    _fold_constants(proto.graph)
    if convolutions:
        _gemm_to_conv(proto.graph)
    return proto


def difference(old: onnx.ModelProto, new: onnx.ModelProto) -> str:
    """What of `new` is not in `old`, or otherwise, in words; nothing if at most the values of weights differ.

    Weights are floating-point constants, but for those that TensorRT builds into its layers.
    """
    for before, after in zip_longest(old.graph.node, new.graph.node):
        if before is None or after is None:
            return f"it has {len(new.graph.node)} nodes, not {len(old.graph.node)}"
        if _bare(before) != _bare(after):
            return f"node {after.name} ({after.op_type}) is another"
    ends = [[list(map(_bare, values)) for values in (p.graph.input, p.graph.output)] for p in (old, new)]
    if ends[0] != ends[1]:
        return "its inputs or outputs are others"
    settings = {name for node in new.graph.node if node.op_type in _SETTINGS for name in node.input[1:]}
    constants = [{t.name: _fixed(t, t.name in settings) for t in p.graph.initializer} for p in (old, new)]
    names = sorted({name for found in constants for name in found})
    odd = next((name for name in names if constants[0].get(name) != constants[1].get(name)), None)
    return f"constant {odd} has another shape, type or fixed value" if odd is not None else ""


def _bare(message: Any) -> bytes:
    """A node or the description of a tensor without notes."""
    copy = type(message)()
    copy.CopyFrom(message)
    copy.ClearField("metadata_props")
    copy.ClearField("doc_string")
    return bytes(copy.SerializeToString(deterministic=True))


def _fixed(tensor: onnx.TensorProto, setting: bool) -> tuple[Any, ...]:
    """What refitting cannot change about a constant."""
    value = b"" if tensor.data_type in _WEIGHTS and not setting else numpy_helper.to_array(tensor).tobytes()
    return tensor.data_type, tuple(tensor.dims), value


def _fold_constants(graph: onnx.GraphProto) -> None:
    """Do the casts and products of constants that `export.half` wrote, as ONNX Runtime does when it opens a graph."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, np.ndarray[Any, Any]] = {}
    kept = []
    for node in graph.node:
        if node.op_type in ("Cast", "Mul") and all(name in made or name in constants for name in node.input):
            values = [made[n] if n in made else numpy_helper.to_array(constants[n]) for n in node.input]
            if node.op_type == "Cast":
                to = helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
                made[node.output[0]] = values[0].astype(to)
            else:
                made[node.output[0]] = values[0] * values[1]
        else:
            kept.append(node)
    used = {name for node in kept for name in node.input}
    rest = [tensor for name, tensor in constants.items() if name in used]
    rest += [numpy_helper.from_array(values, name) for name, values in made.items() if name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(rest)


def _gemm_to_conv(graph: onnx.GraphProto) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "spatial_axes")
    nodes = []
    for node in graph.node:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = {settings.get("alpha", 1.0), settings.get("beta", 1.0)} == {1.0} and not settings.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in constants or not plain:
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(constants[node.input[1]])
        weight = weight if settings.get("transB", 0) else weight.T
        name = node.output[0]
        graph.initializer.append(numpy_helper.from_array(weight[:, :, None, None].copy(), f"{name}.weight"))
        product = helper.make_node(
            "Conv", [f"{name}.in", f"{name}.weight", *node.input[2:]], [f"{name}.out"], node.name, kernel_shape=[1, 1]
        )
        product.metadata_props.extend(node.metadata_props)
        nodes.append(helper.make_node("Unsqueeze", [node.input[0], axes.name], [f"{name}.in"]))
        nodes.append(product)
        nodes.append(helper.make_node("Squeeze", [f"{name}.out", axes.name], [name]))
    graph.initializer.append(axes)
    del graph.node[:]
    graph.node.extend(nodes)


def _parser_errors(parser: Any, modules: dict[str, str]) -> str:
    """What the parser found, a node each, with the module of the model that made the node."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        name = error.node_name()
        where = f"node {name or '?'} ({error.node_operator() or '?'}"
        where += f" of {modules[name]})" if modules.get(name) else ")"
        found.append(f"{where}: {' '.join(error.desc().split())}")
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "its parser refuses " + ("; ".join(found[:_SHOWN]) or "the graph without a reason") + more


def _strongly_typed(trt: Any) -> int:
    """The flag by name: TensorRT 11 moved its bit, and then has nothing else."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _member(capability: str) -> str:
    return "SM" + capability.replace(".", "")


def _set_batch(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> None:
    """One batch size becomes part of the shapes; a range becomes the optimisation profile."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    inputs = [tensor for tensor in inputs if tensor.shape[0] < 0]  # but for rows that all images share
    if batch[0] == batch[2]:
        for tensor in inputs:
            tensor.shape = (batch[0], *tuple(tensor.shape)[1:])
        return
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        profile.set_shape(tensor.name, *((size, *tuple(tensor.shape)[1:]) for size in batch))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"it cannot run batches of {batch[0]} to {batch[2]}")


def _timing_cache(config: Any, path: Path) -> Any:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):  # of another GPU or version
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _network_layers(trt: Any, network: Any, modules: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What the builder was given, constants and arithmetic of shapes left out."""
    numbers = (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if layer.type == trt.LayerType.CONSTANT or not any(tensor.dtype in numbers for tensor in outputs):
            continue
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        # for example "[ONNX Layer: node_conv2d_3]"
        node = layer.metadata.removeprefix("[ONNX Layer: ").removesuffix("]")
        yield {
            "name": layer.name,
            "type": layer.type.name,
            "module": modules.get(node, ""),
            "inputs": [_described(tensor) for tensor in inputs if tensor is not None],
            "outputs": [_described(tensor) for tensor in outputs],
        }


def _described(tensor: Any) -> list[Any]:
    return [tensor.dtype.name.lower(), list(tensor.shape)]


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes on which phase runs, and how far it is."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.said = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.totals[phase] = steps
            self.said = time.monotonic()
            _say(phase=phase, done=0, total=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if time.monotonic() - self.said >= _INTERVAL:
                self.said = time.monotonic()
                _say(phase=phase, done=step + 1, total=self.totals.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            self.totals.pop(phase, None)

    return Monitor()


def _say(**event: Any) -> None:
    try:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    except OSError:  # nobody listens any more: this build is for nothing
        os._exit(1)


if __name__ == "__main__":
    main()
