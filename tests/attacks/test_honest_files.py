"""What torch itself and safetensors write is read exactly, in both of torch's formats."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import dict_of, stream, tensor, zipped
from safetensors.torch import save_file
from torch import Tensor, nn

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.states import read_weights

KINDS = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def read_state(path: Path, modules: Sequence[str] = ()) -> dict[str, Tensor]:
    return read_weights(path, modules).weights


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def save(value: Any, **options: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=request.param, **options)
        return tmp_path / "x.pt"

    return save


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_kind_of_number(saved: Any, protocol: int) -> None:
    values = torch.tensor([[0.0, -1.5, 3.0], [torch.inf, 2.0, -0.0]])
    state = {
        f"kind.{i}": (values.clamp(0, 3) if not k.is_floating_point else values).to(k) for i, k in enumerate(KINDS)
    }
    same(read_state(saved(state, pickle_protocol=protocol)), state)


def test_views(saved: Any) -> None:
    base = torch.arange(24.0)
    state = {
        "whole": base,
        "shifted": base[5:],
        "transposed": base.view(4, 6).t(),
        "every_second": base[::2],
        "scalar": base[7],
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(base[3:5]),
        "again": base,
    }
    same(read_state(saved(state)), state)


def test_a_state_dict_with_torchs_own_notes(saved: Any) -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    assert isinstance(state, OrderedDict)
    assert state._metadata
    same(read_state(saved(state)), dict(state))


def test_a_whole_module_becomes_its_state_dict(saved: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.ModuleList([nn.Linear(1, 1)]))
    module.register_buffer("passing", torch.ones(2), persistent=False)
    module[0].register_forward_hook(print)
    found = None
    with pytest.raises(CheckpointError, match=r"asks for (builtins|__builtin__)\.print"):
        found = read_state(saved(module), ["torch.nn.modules"])
    assert found is None
    module[0]._forward_hooks.clear()
    found = read_state(saved(module), ["torch.nn.modules"])
    expected = module.state_dict()
    same({name: found[name] for name in expected}, dict(expected))
    assert len(found) == len(expected)
    with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.container\.Sequential"):
        read_state(saved(module))


def test_safetensors(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0), "b.c": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "x.safetensors")
    same(read_state(tmp_path / "x.safetensors"), state)


@pytest.mark.parametrize("place", ["cpu", "cuda", "cuda:0", "cuda:7"])
def test_tensors_that_were_on_a_gpu(tmp_path: Path, place: str) -> None:
    value = dict_of({"w": tensor("0", 2, [2], place=place)})
    data = torch.tensor([1.0, 2.0]).numpy().tobytes()
    (tmp_path / "x.pt").write_bytes(stream(value, {"0": (2, data)}))
    same(read_state(tmp_path / "x.pt"), {"w": torch.tensor([1.0, 2.0])})


def test_a_byte_that_is_no_bool_becomes_one(tmp_path: Path) -> None:
    value = dict_of({"w": tensor("0", 3, [3], kind="BoolStorage")})
    (tmp_path / "x.pt").write_bytes(stream(value, {"0": (3, b"\x00\x01\x37")}))
    found = read_state(tmp_path / "x.pt")["w"]
    assert found.view(torch.uint8).tolist() == [0, 1, 1]


def test_the_zip_of_the_generators_is_one_that_torch_reads(tmp_path: Path) -> None:
    value = dict_of({"w": tensor("0", 2, [2])}).replace(b"N" + b"t" + b"Q", b"tQ")  # the zip's ids have no last part
    (tmp_path / "x.pt").write_bytes(zipped(value, {"0": torch.tensor([1.0, 2.0]).numpy().tobytes()}))
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    same(read_state(tmp_path / "x.pt"), expected)


def test_the_stream_of_the_generators_is_one_that_torch_reads(tmp_path: Path) -> None:
    value = dict_of({"w": tensor("0", 2, [2])})
    (tmp_path / "x.pt").write_bytes(stream(value, {"0": (2, torch.tensor([1.0, 2.0]).numpy().tobytes())}))
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    same(read_state(tmp_path / "x.pt"), expected)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no file at"):
            read_state(path)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no model file"):
        read_state(tmp_path / "empty")
