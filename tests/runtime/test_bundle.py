"""A bundle that is not what was exported is refused, with one line that says what and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hflow_rt.errors import BundleError
from hflow_rt.manifest import SCHEMA, read_manifest
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle

Manifest = dict[str, Any]


@pytest.fixture
def bundle(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run / "bundle", tmp_path / "bundle")


def refused(path: Path) -> str:
    """The one line with which a session refuses to sample."""
    with pytest.raises(BundleError) as caught:
        load(path).sample(1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(bundle: Path, change: Callable[[Manifest], object]) -> None:
    values = json.loads((bundle / "manifest.json").read_text())
    change(values)
    (bundle / "manifest.json").write_text(json.dumps(values))


def test_a_run_and_its_bundle_are_the_same(tiny_run: Path) -> None:
    inside, direct = find_bundle(tiny_run), find_bundle(str(tiny_run / "bundle"))
    assert inside == direct
    assert inside.manifest == read_manifest(tiny_run / "bundle")
    assert inside.model == tiny_run / "bundle" / "model.safetensors"


def test_every_file_is_described(tiny_run: Path) -> None:
    found = find_bundle(tiny_run)
    assert {path.name for path in found.path.iterdir()} == {*found.manifest.files, "manifest.json"}
    for name in found.manifest.files:
        assert found.file(name).is_file()


@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_changed_byte(bundle: Path, where: float) -> None:
    data = bytearray((bundle / "forward.onnx").read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (bundle / "forward.onnx").write_bytes(data)
    message = refused(bundle)
    assert "forward.onnx was changed after export (sha256 " in message
    assert message.endswith("export again with 'hflow-rt export'")


def test_changed_constants_close_every_graph(bundle: Path) -> None:
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    session = load(bundle)
    with pytest.raises(BundleError, match=r"weights\.bin was changed after export"):
        session.sample(1)
    (bundle / "weights.bin").unlink()
    with pytest.raises(BundleError, match=r"has no weights\.bin; export again"):
        load(bundle).sample(1)


def test_former_bundles_have_one_file_of_constants(bundle: Path) -> None:
    found = find_bundle(bundle)

    def one_file(values: Manifest) -> None:
        for graph in values["graphs"].values():
            graph["weights"] = next(iter(graph["weights"]), None)

    edit(bundle, one_file)
    assert {graph["weights"] for graph in json.loads((bundle / "manifest.json").read_text())["graphs"].values()} == {
        "weights.bin",
        None,
    }
    assert find_bundle(bundle) == found


def test_only_what_is_used_is_read(bundle: Path) -> None:
    """A broken inverse does not keep anybody from sampling; `check` reads everything."""
    (bundle / "inverse.onnx").write_bytes(b"")
    session = load(bundle)
    assert session.sample(1).shape == (1, 3, 16, 16)
    with pytest.raises(BundleError, match=r"inverse\.onnx must be \d+ bytes, not 0"):
        session.inverse(np.zeros((1, 3, 16, 16), np.float32))


def test_a_changed_model_file(bundle: Path) -> None:
    data = bytearray((bundle / "model.safetensors").read_bytes())
    data[-1] ^= 0x80
    (bundle / "model.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors was changed after export"):
        load(bundle, backend="torch", device="cpu")


def test_a_truncated_file(bundle: Path) -> None:
    data = (bundle / "forward.onnx").read_bytes()
    (bundle / "forward.onnx").write_bytes(data[:-1])
    assert f"must be {len(data)} bytes, not {len(data) - 1}: it was cut or replaced; export again" in refused(bundle)


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "forward.onnx").unlink()
    assert "has no forward.onnx; export again with 'hflow-rt export'" in refused(bundle)


def test_a_missing_engine(bundle: Path) -> None:
    edit(bundle, lambda values: values["graphs"].pop("forward"))
    assert "has no 'forward' engine (it has: inverse, " in refused(bundle)
    with pytest.raises(BundleError, match=r"no 'forward' engine.*'hflow-rt export'"):
        find_bundle(bundle).graph("forward")


def test_a_missing_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    assert f"{bundle} has no exported bundle; run 'hflow-rt export {bundle}' first" in refused(bundle)
    with pytest.raises(BundleError, match=r"it has no manifest\.json; make one with"):
        read_manifest(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"family": "hflow"}'])
def test_a_garbled_manifest(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    message = refused(bundle)
    assert f"{bundle / 'manifest.json'} is broken or of another version (" in message
    assert message.endswith("export again")


def test_another_schema_version(bundle: Path) -> None:
    edit(bundle, lambda values: values.update(schema_version=SCHEMA + 1))
    assert "is broken or of another version (schema_version: " in refused(bundle)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m["latents"][0].update(prior_std="wide"), "latents.0.prior_std: "),
        (lambda m: m["files"].pop("weights.bin"), "graph 'forward' is in weights.bin, which is not among the files"),
        (lambda m: m["files"].pop("inverse.onnx"), "graph 'inverse' is in inverse.onnx, which is not among the files"),
        (lambda m: m["files"].update({"../x": m["files"]["inverse.onnx"]}), "file '../x' lies outside the bundle"),
        (lambda m: m["files"].update({"/x": m["files"]["inverse.onnx"]}), "file '/x' lies outside the bundle"),
    ],
)
def test_an_impossible_manifest(bundle: Path, change: Callable[[Manifest], object], reason: str) -> None:
    edit(bundle, change)
    assert reason in refused(bundle)


def test_a_file_that_is_a_folder(bundle: Path) -> None:
    (bundle / "forward.onnx").unlink()
    (bundle / "forward.onnx").mkdir()
    assert "has no forward.onnx" in refused(bundle)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    names = "glow-emoji, hflow-emoji, ihdm-emoji, nvae-emoji"
    expected = f"{tmp_path / 'nowhere'} does not exist; name a run, a bundle or one of {names}"
    assert refused(tmp_path / "nowhere") == expected


def test_a_path_that_is_a_file(tiny_run: Path) -> None:
    assert "has no exported bundle; run 'hflow-rt export" in refused(tiny_run / "model.safetensors")


def test_a_manifest_survives_its_own_file(tiny_run: Path) -> None:
    manifest = read_manifest(tiny_run / "bundle")
    assert type(manifest).model_validate_json(manifest.dump()) == manifest
    assert manifest.latent_shapes == {"end0": (2, 1, 1), "end1": (6, 1, 1), "z1": (4, 8, 8), "z0": (3, 16, 16)}
    assert list(manifest.prior_std) == list(manifest.latent_shapes)
