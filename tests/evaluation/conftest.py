"""The tiny networks as files."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))

from tiny_networks import WEIGHTS


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[..., Path]:
    """Save a module as TorchScript: `scripted(module, name)`."""

    def save(module: torch.nn.Module, name: str = "means.pt") -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.script(module), str(tmp_path / name))  # type: ignore[no-untyped-call]
        return tmp_path / name

    return save


@pytest.fixture
def onnx_network(tmp_path: Path) -> Callable[..., Path]:
    """Save `Means` as ONNX: `onnx_network(name, kind, shape, keep)`; without `keep` it gives a map, not a vector."""

    def save(
        name: str = "means.onnx",
        kind: int = TensorProto.FLOAT,
        shape: tuple[Any, ...] = ("n", 3, "h", "w"),
        keep: bool = True,
    ) -> Path:
        scale = 255.0 if kind == TensorProto.UINT8 else 1.0
        nodes = [
            helper.make_node("Cast", ["images"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["real", "scale"], ["scaled"]),
        ]
        if keep:
            nodes += [
                helper.make_node("GlobalAveragePool", ["scaled"], ["pooled"]),
                helper.make_node("Flatten", ["pooled"], ["flat"]),
                helper.make_node("MatMul", ["flat", "weights"], ["features"]),
            ]
        else:
            nodes.append(helper.make_node("Relu", ["scaled"], ["features"]))
        graph = helper.make_graph(
            nodes,
            "means",
            [helper.make_tensor_value_info("images", kind, shape)],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(WEIGHTS, "weights"), numpy_helper.from_array(np.float32(scale), "scale")],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / name)
        return tmp_path / name

    return save
