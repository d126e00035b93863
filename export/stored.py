"""Constants of graphs that the model file of the bundle holds already: the graphs refer to it, and no copy is written.

A safetensors file is a header and then plain numbers, as ONNX wants them of a file of constants.
"""

import hashlib
import itertools
import json
import mmap
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

from hflow_rt.export.onnx import WEIGHTS, SharedWeights
from hflow_rt.files import is_file
from hflow_rt.manifest import MODEL, Graph

__all__ = ["stored_tensors", "without_copies"]

# Of the constants' bytes. Where only a few small ones are stored, as of a folded flow in float32, who takes the graphs
# without the model file, such as a web page, would have to take all of it for them.
_WORTH = 1 / 3


def stored_tensors(path: Path) -> dict[bytes, int]:
    """Where the tensors of a safetensors file lie, in bytes from its start, by the sha256 digest of their bytes."""
    with _content(path) as content:
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        places = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return {_digest(content[begin + start : begin + end]): begin + start for start, end in places}


def without_copies(folder: Path, graphs: Mapping[str, Graph]) -> dict[str, Graph]:
    """The graphs of the bundle in `folder`, their constants taken from its model file where that has them, bit for bit.

    Rewrites their files and that of the other constants, which may go. Does nothing where it would save little.
    """
    if not is_file(folder / WEIGHTS):
        return dict(graphs)
    stored = stored_tensors(folder / MODEL)
    protos = {name: onnx.load(folder / graph.file, load_external_data=False) for name, graph in graphs.items()}
    tensors = {name: [t for t in p.graph.initializer if t.external_data] for name, p in protos.items()}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        rest = SharedWeights(Path(temporary) / WEIGHTS)
        with _content(folder / WEIGHTS) as content:
            places = {_place(tensor) for found in tensors.values() for tensor in found}
            digests = {(start, end): _digest(content[start:end]) for start, end in places}
            if sum(end - start for start, end in places if digests[start, end] in stored) < _WORTH * len(content):
                return dict(graphs)
            for tensor in itertools.chain(*tensors.values()):
                start, end = _place(tensor)
                tensor.raw_data = content[start:end]
                if digests[start, end] not in stored:
                    rest.take(tensor)
                    continue
                set_external_data(tensor, MODEL, stored[digests[start, end]], end - start)
                tensor.ClearField("raw_data")
        (folder / WEIGHTS).unlink()
        if is_file(rest.path):
            rest.path.rename(folder / WEIGHTS)
    changed = {}
    for name, proto in protos.items():
        path = folder / graphs[name].file
        path.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(str(path))
        files = {entry.value for tensor in tensors[name] for entry in tensor.external_data if entry.key == "location"}
        changed[name] = graphs[name].model_copy(update={"weights": tuple(sorted(files))})
    return changed


@contextmanager
def _content(path: Path) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _place(tensor: onnx.TensorProto) -> tuple[int, int]:
    """Where in its file the values of a tensor begin and end."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    return int(said["offset"]), int(said["offset"]) + int(said["length"])


def _digest(values: bytes) -> bytes:
    return hashlib.sha256(values).digest()
