"""Build one plan, in a process of its own: `python -m hflow_rt.export.tensorrt_build < REQUEST`.

TensorRT's parser and builder are native code that a bad graph can crash; here that costs an error message. The request
is one JSON object, `BuildRequest`, on stdin. Events come as JSON lines on stdout: `{"phase", "done", "total"}` while
it works, then `{"error"}` or `{"types", "seconds"}`. Nothing here makes a TensorRT runtime, which would need a GPU.
"""

import importlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from pydantic import BaseModel

from hflow_rt.manifest import MODULE

__all__ = ["BuildRequest", "main", "prepared"]

_INTERVAL = 0.2  # seconds between reports of one phase
_SHOWN = 5  # parser errors
_MIB = 1 << 20
# TensorRT for RTX has no float32 matrix product for Turing, but it has convolutions
_NO_GEMM = "7.5"


class BuildRequest(BaseModel):
    """What to build: `onnx` into `plan`, its layers into `layers`.

    capabilities: of the GPUs to build for; None where the product builds for the GPU that it runs on. workspace: MiB.
    timing_cache: file to start from, if it is there, and to leave the timings in; None where the product has none.
    """

    module: str
    onnx: Path
    plan: Path
    layers: Path
    batch: tuple[int, int, int]
    capabilities: tuple[str, ...] | None = None
    workspace: int | None = None
    timing_cache: Path | None = None


class _BuildError(Exception):
    """TensorRT does not build this, for the reason given."""


def main() -> None:
    """Build what stdin asks for."""
    # events have stdout for themselves: whatever else prints, such as native code, does so on stderr
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = BuildRequest.model_validate_json(sys.stdin.buffer.read())
    try:
        _say(**_build(request))
    except _BuildError as error:
        _say(error=str(error))


def _build(request: BuildRequest) -> dict[str, Any]:
    started = time.monotonic()
    trt = importlib.import_module(request.module)
    messages: list[str] = []
    logger = _logger(trt, messages)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what the binding makes of a null pointer: TensorRT finds no CUDA
        raise _BuildError("it cannot build on this machine, where it finds no usable GPU") from error
    proto = prepared(request.onnx, convolutions=_NO_GEMM in (request.capabilities or ()))
    modules = {node.name: p.value for node in proto.graph.node for p in node.metadata_props if p.key == MODULE}
    _say(phase="parsing", done=0, total=1)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(proto.SerializeToString()):
        raise _BuildError(_parser_errors(parser, modules))
    del proto
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # keeps 10 bits of the flow's state, which then cannot be inverted
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
        raise _BuildError(messages[0] if messages else "it gives no reason")
    request.plan.write_bytes(plan)
    if cache is not None and request.timing_cache is not None:
        request.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    types = _write_layers(trt, network, modules, request.layers)
    return {"types": types, "seconds": round(time.monotonic() - started, 1)}


def prepared(path: Path, convolutions: bool = False) -> onnx.ModelProto:
    """The graph at `path` in one piece, for the parser: constants inside, and those kept in half precision unfolded.

    convolutions: write matrix products with constants as 1x1 convolutions.
    """
    proto = onnx.load(str(path))
    _fold_constants(proto.graph)
    if convolutions:
        _gemm_to_conv(proto.graph)
    return proto


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
    if batch[0] == batch[2]:
        for tensor in inputs:
            tensor.shape = (batch[0], *tuple(tensor.shape)[1:])
        return
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        profile.set_shape(tensor.name, *((size, *tuple(tensor.shape)[1:]) for size in batch))
    if config.add_optimization_profile(profile) < 0:
        raise _BuildError(f"it cannot run batches of {batch[0]} to {batch[2]}")


def _timing_cache(config: Any, path: Path) -> Any:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):  # of another GPU or version
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _write_layers(trt: Any, network: Any, modules: dict[str, str], path: Path) -> dict[str, int]:
    """Write what the builder was given, a JSON object a line, constants and arithmetic of shapes left out."""
    numbers = (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16)
    counts: Counter[str] = Counter()
    with open(path, "w", encoding="utf-8") as file:
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            if layer.type == trt.LayerType.CONSTANT or not any(tensor.dtype in numbers for tensor in outputs):
                continue
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            # for example "[ONNX Layer: node_conv2d_3]"
            node = layer.metadata.removeprefix("[ONNX Layer: ").removesuffix("]")
            entry = {
                "name": layer.name,
                "type": layer.type.name,
                "module": modules.get(node, ""),
                "inputs": [_described(tensor) for tensor in inputs if tensor is not None],
                "outputs": [_described(tensor) for tensor in outputs],
            }
            file.write(json.dumps(entry) + "\n")
            counts[outputs[0].dtype.name.lower()] += 1
    return dict(counts.most_common())


def _described(tensor: Any) -> list[Any]:
    return [tensor.dtype.name.lower(), list(tensor.shape)]


def _logger(trt: Any, messages: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Logger()


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
