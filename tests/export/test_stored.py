"""Constants that the model file holds are not written again: graphs read them from it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from hflow_rt.export.onnx import SharedWeights
from hflow_rt.export.stored import stored_tensors, without_copies
from hflow_rt.manifest import Graph

RNG = np.random.default_rng(0)
SINGLE, OTHER = (RNG.standard_normal((30, 30)).astype(np.float32) for _ in range(2))
HALF = RNG.standard_normal((30, 30)).astype(np.float16)
ODD = RNG.standard_normal(3).astype(np.float16)  # what lies behind it is not where a cache line begins


def written(folder: Path, constants: dict[str, dict[str, np.ndarray]]) -> dict[str, Graph]:
    """Graphs that add up products of their input with each of their constants, and the file of these."""
    weights, graphs = SharedWeights(folder / "weights.bin"), {}
    for name, values in constants.items():
        wide = {key: f"{key}.wide" if value.dtype == np.float16 else key for key, value in values.items()}
        nodes = [helper.make_node("Cast", [k], [v], to=TensorProto.FLOAT) for k, v in wide.items() if k != v]
        nodes += [helper.make_node("MatMul", ["x", v], [f"{k}.x"]) for k, v in wide.items()]
        nodes += [helper.make_node("Sum", [f"{key}.x" for key in values], ["y"])]
        ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", 30]) for end in "xy"]
        tensors = [numpy_helper.from_array(value, key) for key, value in values.items()]
        graph = helper.make_graph(nodes, name, ends[:1], ends[1:], tensors)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        for tensor in proto.graph.initializer:
            weights.take(tensor)
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
        graphs[name] = Graph(
            file=f"{name}.onnx", weights=("weights.bin",), inputs=(), outputs=(), batch=(1, 2), operators={}
        )
    return graphs


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 30)})[0]


def test_where_tensors_lie(tmp_path: Path) -> None:
    tensors = {"odd": ODD, "half": HALF, "single": SINGLE}
    save_file(tensors, tmp_path / "m.safetensors", {"a": "note"})
    content = (tmp_path / "m.safetensors").read_bytes()
    places = stored_tensors(tmp_path / "m.safetensors")
    assert sorted(len(key) for key in places) == [32, 32, 32]
    for value in tensors.values():
        assert any(content[at : at + value.nbytes] == value.tobytes() for at in places.values())


def test_graphs_read_the_model_file(tmp_path: Path) -> None:
    save_file({"odd": ODD, "half": HALF, "single": SINGLE}, tmp_path / "model.safetensors")
    before = load_file(tmp_path / "model.safetensors")
    graphs = written(
        tmp_path, {"one": {"a": HALF, "b": SINGLE, "c": OTHER}, "two": {"a": HALF}, "three": {"c": OTHER, "d": -OTHER}}
    )
    expected = {name: run(tmp_path / graph.file) for name, graph in graphs.items()}
    found = without_copies(tmp_path, graphs)
    assert {name: graph.weights for name, graph in found.items()} == {
        "one": ("model.safetensors", "weights.bin"),
        "two": ("model.safetensors",),
        "three": ("weights.bin",),
    }
    rest = (tmp_path / "weights.bin").read_bytes()
    assert OTHER.tobytes() in rest
    assert HALF.tobytes() not in rest
    assert SINGLE.tobytes() not in rest
    for name, graph in found.items():
        assert (run(tmp_path / graph.file) == expected[name]).all()
        onnx.load(tmp_path / graph.file)  # as TensorRT's builder reads it
    assert all((value == before[name]).all() for name, value in load_file(tmp_path / "model.safetensors").items())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".onnx", ".onnx", ".onnx", ".safetensors"]


def test_nothing_is_left_to_write(tmp_path: Path) -> None:
    save_file({"half": HALF}, tmp_path / "model.safetensors")
    graphs = written(tmp_path, {"one": {"a": HALF}})
    expected = run(tmp_path / "one.onnx")
    assert without_copies(tmp_path, graphs)["one"].weights == ("model.safetensors",)
    assert not (tmp_path / "weights.bin").exists()
    assert (run(tmp_path / "one.onnx") == expected).all()


@pytest.mark.parametrize("others", [0, 4])
def test_little_is_copied_rather_than_shared(tmp_path: Path, others: int) -> None:
    """A page or a server that takes the graphs would have to take the whole model file for it."""
    save_file({"half": HALF}, tmp_path / "model.safetensors")
    constants = {"a": HALF, **{f"b{index}": OTHER * index for index in range(1, others + 1)}}
    graphs = written(tmp_path, {"one": constants})
    found = without_copies(tmp_path, graphs)
    assert (found == graphs) == (others > 0)
