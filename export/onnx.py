"""Write a graph of a family as ONNX: dynamic batch, static size, checked, no stack traces inside."""

import ast
import collections
import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Collection, Container, Iterator
from pathlib import Path

import onnx
import torch
from onnx.external_data_helper import set_external_data

from hflow_rt.choices import Precision
from hflow_rt.errors import HFlowError
from hflow_rt.export.half_weights import halve
from hflow_rt.export.mixed_precision import to_mixed_precision
from hflow_rt.export.tuning import Worth, choose_rewrites
from hflow_rt.manifest import MODULE, Graph
from hflow_rt.models.describe import described_tensor
from hflow_rt.models.family import Gain, GraphSpec, TensorSpec

__all__ = ["MAX_BATCH", "OPSET", "WEIGHTS", "SharedWeights", "export_graph", "operator_counts"]

OPSET = 20  # 17 is silently invalid with this exporter; 22 and up only for bfloat16
MAX_BATCH = 64
WEIGHTS = "weights.bin"
# Smaller constants stay in the graph, where shape inference and graph viewers see them.
_INLINE_BYTES = 1024
_ALIGNMENT = 64  # bytes: of a cache line
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


class SharedWeights:
    """The constants of all graphs of a bundle in one file, each once.

    Both routes of a flow run the same nets, so this halves a bundle; it also lifts ONNX's limit of 2 GB.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}

    def take(self, tensor: onnx.TensorProto) -> None:
        """Move the values of `tensor` into the file, or point it at equal ones that are there."""
        values = tensor.raw_data
        if len(values) < _INLINE_BYTES:
            return
        key = hashlib.sha256(values).digest()
        if key not in self._places:
            with open(self.path, "ab") as file:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                self._places[key] = file.tell()
                file.write(values)
        set_external_data(tensor, self.path.name, self._places[key], len(values))
        tensor.ClearField("raw_data")


def export_graph(
    spec: GraphSpec,
    path: Path,
    metadata: dict[str, str],
    weights: SharedWeights,
    gains: Collection[Gain] = (),
    stored: Container[bytes] = (),
    precision: Precision = "fp32",
    worth: Worth | None = None,
) -> Graph:
    """Export `spec` to the ONNX file `path` and describe it; its constants go into `weights`, in the same folder.

    gains, stored: constants that are half-precision numbers times a gain are kept as such (see `halve`). precision:
    `mixed` computes the nets of `spec` in float16 (see `mix`). worth: which rewrites to take (see `tune`), by default
    none. Raises `HFlowError` if the result is not valid.
    """
    module = spec.module.eval()
    examples = tuple(_example(tensor) for tensor in spec.inputs)
    batch = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    dynamic = tuple(None if tensor.role == "schedule" else batch for tensor in spec.inputs)
    # a module of `*args` takes its shapes as one tuple
    variadic = module.forward.__code__.co_flags & 0x04
    shapes = (dynamic,) if variadic else dynamic
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
    if precision == "mixed" and not to_mixed_precision(proto, spec.nets, spec.heads):
        raise HFlowError(f"graph '{spec.name}' has no nets to compute in half precision; export with --precision fp32")
    rewrites = {} if worth is None else choose_rewrites(proto, worth)
    if gains:
        halve(proto, gains, stored)
    onnx.checker.check_model(proto, full_check=True)
    counts = operator_counts(proto)
    if leftover := sorted(_UNFOLDED & counts.keys()):
        raise HFlowError(
            f"graph '{spec.name}' still holds {', '.join(leftover)}; the family must fold it before export"
        )
    for tensor in proto.graph.initializer:
        weights.take(tensor)
    path.write_bytes(proto.SerializeToString())
    onnx.checker.check_model(str(path))  # also that the constants are where the graph says
    return Graph(
        file=path.name,
        weights=(weights.path.name,) if any(tensor.external_data for tensor in proto.graph.initializer) else (),
        inputs=tuple(described_tensor(tensor) for tensor in spec.inputs),
        outputs=tuple(described_tensor(tensor) for tensor in spec.outputs),
        batch=(1, MAX_BATCH),
        operators=counts,
        rewrites=rewrites,
    )


def operator_counts(proto: onnx.ModelProto) -> dict[str, int]:
    """How often each operator stands in the graph, most frequent first."""
    return dict(collections.Counter(node.op_type for node in proto.graph.node).most_common())


def _example(tensor: TensorSpec) -> torch.Tensor:
    """Two samples of plausible input: batch 1 would be specialised."""
    generator = torch.Generator().manual_seed(0)
    if tensor.range is None:
        return torch.randn(tensor.batched(2), generator=generator)
    low, high = tensor.range
    return low + (high - low) * torch.rand(tensor.batched(2), generator=generator)


def _strip(proto: onnx.ModelProto) -> None:
    """Keep of the exporter's notes only which module a node came from: stack traces hold paths of this machine.

    Shapes of inner values go too: every reader infers them, and they are a sixth of a graph.
    """
    for node in proto.graph.node:
        scopes = [prop.value for prop in node.metadata_props if prop.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        if scopes:  # a list of names from the graph down to the node itself
            node.metadata_props.add(key=MODULE, value=["", *ast.literal_eval(scopes[0])][-2])
        node.doc_string = ""
    del proto.graph.value_info[:]
    for entries in (proto.graph.input, proto.graph.output, proto.graph.initializer):
        for entry in entries:
            del entry.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports progress on stdout, and warns of packages we do not use and of constants it leaves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
