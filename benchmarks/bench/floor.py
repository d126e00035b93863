"""How much arithmetic and memory traffic a graph cannot do without, by part of the model.

    python -m hflow_rt.bench.floor BUNDLE

Counted are convolutions and matrix products: two operations a multiply-add; each reads its weights and its input once
and writes its output once, as if everything between them were fused into them. What a machine needs at least is
the larger of operations over its rate and bytes over its bandwidth (`bench` measures both).
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hflow_rt.bench.variants import loop_of
from hflow_rt.extras import needed
from hflow_rt.manifest import MODULE
from hflow_rt.runtime.bundle import Bundle, find_bundle

__all__ = ["Work", "count", "floor_seconds", "work_of"]

_FLOAT = 4  # bytes


@dataclass
class Work:
    """Operations and bytes of one image; weights are read once a call, whatever the batch."""

    operations: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.operations + other.operations,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
        )


def count(bundle: Bundle, graph: str) -> dict[str, Work]:
    """Work by part of the model: `levels.0`, `end_flow` and so on. Raises `BackendUnavailable` without onnx."""
    with needed("onnx", "counting operations needs onnx: pip install 'hflow-rt[train]'"):
        import onnx
    proto = onnx.load(str(bundle.graph(graph)), load_external_data=False)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    inner = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph  # sizes that are computed, too
    shapes = {value.name: _shape(value) for value in (*inner.value_info, *inner.input, *inner.output)}
    shapes |= {tensor.name: list(tensor.dims) for tensor in inner.initializer}
    constants = {tensor.name for tensor in inner.initializer}
    found: dict[str, Work] = {}
    for node in inner.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        output, inputs = shapes[node.output[0]], [shapes[name] for name in node.input[:2]]
        # what one output number sums over: a kernel of a convolution, a row of a matrix
        summed = math.prod(inputs[1][1:]) if node.op_type == "Conv" else inputs[0][-1]
        elements = [math.prod(shape) for shape in inputs]
        fixed = [name in constants for name in node.input[:2]]
        part = _part(next((p.value for p in node.metadata_props if p.key == MODULE), ""))
        found[part] = found.get(part, Work()) + Work(
            2.0 * summed * math.prod(output),
            _FLOAT * sum(n for n, known in zip(elements, fixed, strict=True) if known),
            _FLOAT * (sum(n for n, known in zip(elements, fixed, strict=True) if not known) + math.prod(output)),
        )
    return found


def work_of(bundle: Bundle, case: str) -> Work:
    """All work of a graph, or of a route that is a loop. Raises as `count`."""
    loop = loop_of(bundle.manifest, case)
    if loop is None:
        return sum(count(bundle, case).values(), Work())
    start, step = (work_of(bundle, name) for name in loop.graphs)
    return sum([step] * loop.steps, start)


def floor_seconds(work: Work, batch: int, operations_per_second: float, bytes_per_second: float) -> float:
    """The least time of one call with `batch` images."""
    traffic = work.weight_bytes + batch * work.activation_bytes
    return max(batch * work.operations / operations_per_second, traffic / bytes_per_second)


def _shape(value: Any) -> list[int]:
    """Of one image: shape inference loses the batch behind a reshape, but nothing else."""
    sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    return [sizes[0] or 1, *sizes[1:]] if sizes else []


def _part(module: str) -> str:
    """The module's name down to the first number: `model.levels.2.decoder.conv1` is part of `levels.2`."""
    found = re.match(r"(?:model\.)?(\w+(?:\.\d+)?)", module)
    return found[1] if found else "rest"


def main() -> None:
    """Print a table of every graph of the bundle named on the command line."""
    bundle = find_bundle(Path(sys.argv[1]))
    print("| graph | part | GFLOP an image | weights MB | activations MB an image |\n|---|---|---:|---:|---:|")
    for graph in bundle.manifest.graphs:
        parts = count(bundle, graph)
        for name, work in {**parts, "**all**": sum(parts.values(), Work())}.items():
            megabytes = f"{work.weight_bytes / 1e6:.1f} | {work.activation_bytes / 1e6:.1f}"
            print(f"| {graph} | {name} | {work.operations / 1e9:.3f} | {megabytes} |")


if __name__ == "__main__":
    main()
