"""Write a graph of a family as ONNX: dynamic batch, static size, checked, no stack traces inside."""

import collections
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch

from hflow_rt.errors import HFlowError
from hflow_rt.manifest import Graph, Tensor
from hflow_rt.models.family import GraphSpec, TensorSpec

__all__ = ["MAX_BATCH", "OPSET", "export_graph", "operator_counts"]

OPSET = 20  # 17 is silently invalid with this exporter; 22 and up only for bfloat16
MAX_BATCH = 64
# every one of these means that something independent of the input was not folded
_UNFOLDED = {
    "Inverse",
    "Det",
    "ScatterND",
    "ScatterElements",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "Loop",
    "If",
}


def export_graph(spec: GraphSpec, path: Path, metadata: dict[str, str]) -> Graph:
    """Export `spec` to the ONNX file `path` and describe it. Raises `HFlowError` if the result is not valid."""
    module = spec.module.eval()
    examples = tuple(_example(tensor) for tensor in spec.inputs)
    batch = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    # a module of `*args` takes its shapes as one tuple
    variadic = module.forward.__code__.co_flags & 0x04
    shapes = (tuple(batch for _ in examples),) if variadic else tuple(batch for _ in examples)
    with _quiet():
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _strip(proto)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    counts = operator_counts(proto)
    if leftover := sorted(_UNFOLDED & counts.keys()):
        raise HFlowError(
            f"graph '{spec.name}' still holds {', '.join(leftover)}; the family must fold it before export"
        )
    path.write_bytes(proto.SerializeToString())
    return Graph(
        file=path.name,
        inputs=tuple(_described(tensor) for tensor in spec.inputs),
        outputs=tuple(_described(tensor) for tensor in spec.outputs),
        batch=(1, MAX_BATCH),
        operators=counts,
    )


def operator_counts(proto: onnx.ModelProto) -> dict[str, int]:
    """How often each operator stands in the graph, most frequent first."""
    return dict(collections.Counter(node.op_type for node in proto.graph.node).most_common())


def _example(tensor: TensorSpec) -> torch.Tensor:
    """Two samples of plausible input: batch 1 would be specialised."""
    generator = torch.Generator().manual_seed(0)
    if tensor.range is None:
        return torch.randn(2, *tensor.shape, generator=generator)
    low, high = tensor.range
    return low + (high - low) * torch.rand(2, *tensor.shape, generator=generator)


def _described(tensor: TensorSpec) -> Tensor:
    return Tensor(name=tensor.name, shape=tensor.shape, range=tensor.range)


def _strip(proto: onnx.ModelProto) -> None:
    """Keep of the exporter's notes only which module a node came from: stack traces hold paths of this machine."""
    for node in proto.graph.node:
        kept = [prop for prop in node.metadata_props if prop.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    for entries in (proto.graph.value_info, proto.graph.input, proto.graph.output, proto.graph.initializer):
        for entry in entries:
            del entry.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports progress on stdout and warns about packages we do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
