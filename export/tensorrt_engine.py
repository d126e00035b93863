"""What needs a GPU that can load a plan: its layers as the engine has them, and other weights for it.

Runs in the process of `tensorrt_build`. A TensorRT runtime is made only once a GPU was found: without one it takes the
process down.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hflow_rt.runtime.engines.cuda import Cuda, chosen_gpu

__all__ = ["EngineError", "engine_layers", "loaded", "refitted", "write_layers"]

_SHOWN = 5  # missing weights
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# the inspector says for example "Half" or "Row major linear FP16 format"
_TYPES = {
    "float": r"float|fp32", "half": r"half|fp16", "bf16": r"bf16|bfloat16", "int8": r"int8", "int32": r"int32",
    "int64": r"int64", "bool": r"bool",
}  # fmt: skip


class EngineError(Exception):
    """TensorRT does not do this, for the reason given."""


@contextlib.contextmanager
def loaded(trt: Any, plan: Path, logger: Any, messages: list[str]) -> Iterator[Any]:
    """The engine of a plan on this process's GPU. Raises `EngineError` without one, or where TensorRT refuses."""
    gpu = chosen_gpu()
    if gpu is None:
        raise EngineError("it loads a plan on an NVIDIA GPU only, and none was found here")
    with Cuda(gpu).current():
        runtime = trt.Runtime(logger)
        runtime.engine_host_code_allowed = False  # a plan is data; code of the host in it is not run
        messages.clear()
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise EngineError(f"it refuses {plan.name}: {_reason(messages)}")
        yield engine


def refitted(trt: Any, engine: Any, onnx: bytes, logger: Any, messages: list[str]) -> bytes:
    """The plan of `engine` with the weights of an ONNX graph of the same structure. Raises `EngineError`."""
    if not engine.refittable:
        raise EngineError("the plan was not built with --refit")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    messages.clear()
    taken = parser.refit_from_bytes(onnx)
    if missing := refitter.get_missing_weights():
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise EngineError(f"the graph has no weights for {', '.join(missing[:_SHOWN])}{more}")
    if not taken:
        found = [" ".join(parser.get_error(index).desc().split()) for index in range(parser.num_errors)]
        raise EngineError(f"it does not take the weights: {_reason(found or messages)}")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"it cannot refit the engine: {_reason(messages)}")
    settings = engine.create_serialization_config()
    settings.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    settings.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # so that it can be refitted again
    plan = engine.serialize_with_config(settings)
    if plan is None:
        raise EngineError(f"it cannot write the refitted engine: {_reason(messages)}")
    return bytes(plan)


def engine_layers(trt: Any, engine: Any, modules: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What the engine really runs, fused as it is: each layer with the modules of the model that it came from."""
    inspector = engine.create_engine_inspector()
    found = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    for layer in found["Layers"]:
        if isinstance(layer, str):  # a plan that was built without details
            layer = {"Name": layer}
        nodes = _NODE.findall(layer.get("Metadata", ""))
        yield {
            "name": layer["Name"],
            "type": layer.get("LayerType", "layer"),
            "module": " + ".join(dict.fromkeys(modules[node] for node in nodes if modules.get(node))),
            "inputs": [_described(tensor) for tensor in layer.get("Inputs", [])],
            "outputs": [_described(tensor) for tensor in layer.get("Outputs", [])],
        }


def write_layers(layers: Iterable[dict[str, Any]], path: Path) -> dict[str, int]:
    """Write layers, a JSON object a line; how many yield each number type, most frequent first."""
    counts: Counter[str] = Counter()
    with open(path, "w", encoding="utf-8") as file:
        for layer in layers:
            file.write(json.dumps(layer) + "\n")
            counts[layer["outputs"][0][0] if layer["outputs"] else "untyped"] += 1
    return dict(counts.most_common())


def _described(tensor: dict[str, Any]) -> list[Any]:
    text = str(tensor.get("Format/Datatype", "")).lower()
    kind = next((name for name, words in _TYPES.items() if re.search(rf"\b(?:{words})\b", text)), text or "untyped")
    return [kind, list(tensor.get("Dimensions", []))]


def _reason(messages: Sequence[str]) -> str:
    return messages[0] if messages else "it gives no reason"
