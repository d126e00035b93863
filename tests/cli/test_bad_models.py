"""Model files and bundles that cannot be used: one line, exit code 1, nothing half-written."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import refused, tree
from safetensors.torch import load_file, save_file

from hflow_rt.models.checkpoint import METADATA_KEY, load_model, read_metadata

Command = Callable[..., Any]


# model files


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.9999])
def test_a_truncated_model_file(hflow: Command, run: Path, share: float) -> None:
    model = run / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[: int(share * len(whole))])
    for command in ("export", "info"):
        refused(hflow(command), f"{model} is not a whole safetensors file (", "copy or train it again")


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x10\0\0\0\0\0\0\0" + b"{" * 16, b"words"])
def test_a_corrupt_model_file(hflow: Command, run: Path, content: bytes) -> None:
    (run / "model.safetensors").write_bytes(content)
    refused(hflow("export"), "is not a whole safetensors file (")


def rewrite(model: Path, metadata: Mapping[str, Any] | str | None, change: Command = lambda tensors: None) -> None:
    tensors = load_file(model)
    change(tensors)
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(tensors, model, None if metadata is None else {METADATA_KEY: text})


def test_tensors_of_something_else(hflow: Command, run: Path) -> None:
    model = run / "model.safetensors"
    rewrite(model, None)
    refused(hflow("export"), f"{model} holds tensors but no hflow-rt settings")


@pytest.mark.parametrize("settings", ["{", "[]", "{}", '{"family": "hflow"}', '{"family": 3, "config": {}}'])
def test_settings_inside_that_make_no_sense(hflow: Command, run: Path, settings: str) -> None:
    rewrite(run / "model.safetensors", settings)
    for command in ("export", "info"):
        refused(hflow(command), f"{run}/model.safetensors: the settings inside ")


def test_a_model_of_another_family(hflow: Command, run: Path) -> None:
    model = run / "model.safetensors"
    rewrite(model, read_metadata(model) | {"family": "someflow"})
    refused(hflow("export"), "unknown model family 'someflow'; known: ", "hflow")


def test_a_model_of_another_shape(hflow: Command, run: Path) -> None:
    model = run / "model.safetensors"
    shapes = load_model(model).state_dict()
    metadata = read_metadata(model)
    metadata["config"]["levels"][0]["decoder_channels"] = 10
    rewrite(model, metadata)
    result = hflow("export")
    refused(result, f"{model} does not fit the model: ", "more")
    # each names the parameter and both shapes
    message = result.err.splitlines()[-1].partition(": ")[2].partition(": ")[2]
    for line in message.split("; ")[:-1]:
        name, _, rest = line.partition(" is ")
        found, _, needed = rest.removesuffix(" in the model").partition(" in the file and ")
        assert found == str(list(shapes[name].shape))
        assert needed != found
        assert "10" in needed


def test_a_model_file_that_lacks_a_weight_or_holds_nan(hflow: Command, run: Path) -> None:
    model = run / "model.safetensors"
    metadata, names = read_metadata(model), sorted(load_file(model))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[names[0]]
        tensors[names[1]] = torch.full_like(tensors[names[1]], torch.nan)
        tensors["extra"] = torch.zeros(2)

    rewrite(model, metadata, change)
    refused(hflow("export"), f"missing {names[0]} [", f"{names[1]} holds NaN", "unexpected extra [2]")


def test_a_model_file_that_is_not_there(hflow: Command, run: Path) -> None:
    refused(hflow("export", "nowhere"), "no run at nowhere; train one with 'hflow-rt train'")
    refused(hflow("info", "nowhere"), "no run at nowhere")
    Path("empty").mkdir()
    refused(hflow("export", "empty"), "empty holds no model.safetensors, so it is no trained run")


# bundles


@pytest.mark.parametrize("command", [("sample", "-n", 1), ("check",), ("interpolate",)])
def test_a_bundle_with_a_changed_byte(hflow: Command, run: Path, command: tuple[object, ...]) -> None:
    engine = run / "bundle" / "forward.onnx"
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    before = tree()
    refused(hflow(*command), f"{engine} was changed after export (sha256 ", "export again")
    assert tree() == before


def test_a_truncated_engine(hflow: Command, run: Path) -> None:
    os.truncate(run / "bundle" / "forward.onnx", 1000)
    refused(hflow("sample"), "must be ", " bytes, not 1000: it was cut or replaced; export again")


def test_a_missing_engine_file(hflow: Command, run: Path, photo: Command) -> None:
    (run / "bundle" / "inverse.onnx").unlink()
    refused(hflow("encode", photo("a.png")), f"{run}/bundle has no inverse.onnx; export again with 'hflow-rt export'")
    refused(hflow("check"), "has no inverse.onnx")
    assert hflow("sample", "-n", 1).code == 0


def test_a_route_that_was_not_exported(hflow: Command, run: Path, photo: Command) -> None:
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    for graph in ("inverse", "end_inverse"):
        del manifest["graphs"][graph]
    (run / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    expected = "has no 'inverse' engine (it has: forward, end_forward); export it with 'hflow-rt export'"
    refused(hflow("encode", photo("a.png")), expected)
    refused(hflow("interpolate", "--space", "y0"), "has no 'end_inverse' engine")


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 2}', "[1]"])
def test_a_garbled_manifest(hflow: Command, run: Path, content: str) -> None:
    (run / "bundle" / "manifest.json").write_text(content)
    for command in ("sample", "check", "info"):
        refused(hflow(command), f"{run}/bundle/manifest.json is broken or of another version (", "export again")


def test_export_does_not_replace_what_is_no_bundle(hflow: Command, run: Path, photo: Command) -> None:
    photo("photos/a.png")
    refused(hflow("export", "-o", "photos"), "photos exists and is not a bundle; choose another --out")
    assert tree("photos") == {"a.png"}
