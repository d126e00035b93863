"""Export writes graphs that are the model (A10), clean, complete and atomically."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from hflow_rt.errors import BundleError, CheckpointError, DataError, HFlowError
from hflow_rt.evaluation.bits import bits_per_dim
from hflow_rt.export import bundle as export_module
from hflow_rt.export.bundle import check_bundle, export_bundle
from hflow_rt.export.judging import compare, failures
from hflow_rt.export.onnx import SharedWeights, export_graph
from hflow_rt.export.parity import run_parity
from hflow_rt.files import sha256
from hflow_rt.manifest import read_manifest
from hflow_rt.models.checkpoint import load_model, save_model
from hflow_rt.models.family import GraphSpec, TensorSpec
from hflow_rt.models.hflow.network import HFlow
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle
from hflow_rt.runtime.session import open_bundle

IMAGES = np.random.default_rng(0).uniform(0, 1, (3, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a10_engines_are_the_model(tiny_run: Path, tiny_model: Any, batch: int) -> None:
    session = load(tiny_run)
    reference = tiny_model.float()
    images = np.random.default_rng(batch).uniform(0, 1, (batch, 3, 16, 16)).astype(np.float32)
    encoded = session.inverse(images)
    with torch.no_grad():
        expected = reference.encode(torch.from_numpy(images))
        decoded = reference.decode({n: torch.from_numpy(z) for n, z in encoded.latents.items()})
    assert list(encoded.latents) == list(expected.latents) == ["end0", "end1", "z1", "z0"]
    for name, latent in encoded.latents.items():
        assert np.abs(latent - expected.latents[name].numpy()).max() < 1e-4
    assert np.abs(encoded.log_prob - expected.log_prob.numpy()).max() < 1e-4 * np.abs(encoded.log_prob).max()
    image = session.forward(encoded.latents)
    assert np.abs(image - decoded.numpy()).max() < 5e-4
    assert np.abs(image - images).max() < 1e-3
    assert (np.rint(image * 255) == np.rint(images * 255)).all()


def test_graphs_are_clean(tiny_run: Path) -> None:
    manifest = read_manifest(tiny_run / "bundle")
    assert set(manifest.graphs) == {"forward", "inverse", "end_forward", "end_inverse"}
    for name, graph in manifest.graphs.items():
        proto = onnx.load(tiny_run / "bundle" / graph.file)
        onnx.checker.check_model(proto, full_check=True)
        counts = graph.operators
        assert counts == {op: sum(n.op_type == op for n in proto.graph.node) for op in counts}
        assert not counts.keys() & {
            "ScatterND",
            "MatMul",
            "Einsum",
            "Identity",
            "RandomNormalLike",
            "Where",
            "Gather",
        }
        assert counts.get("Shape", 0) <= 8, f"{name}: {counts}"
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        assert metadata["family"] == "hflow"
        assert metadata["graph"] == name
        assert "/" not in "".join(p.value for n in proto.graph.node for p in n.metadata_props).replace("/ops", "")
        for tensor in (*proto.graph.input, *proto.graph.output):
            sides = tensor.type.tensor_type.shape.dim
            assert sides[0].dim_param
            assert all(side.dim_value for side in sides[1:])


def test_spaces_go_there_and_back(tiny_run: Path) -> None:
    session = load(tiny_run)
    latents = session.inverse(IMAGES).latents
    inside = session.into_space("y0", latents)
    assert list(inside) == ["u0", "u1", "z1", "z0"]
    back = session.from_space("y0", inside)
    for name, value in latents.items():
        np.testing.assert_allclose(back[name], value, atol=1e-5)


def test_folded_model_is_the_model(tiny_model: Any) -> None:
    """Folding changes only rounding: a folded copy kept in float64 agrees to 1e-10."""
    import copy

    from hflow_rt.layers.fold import fold_children
    from hflow_rt.models.hflow.folded import FOLDS

    double = copy.deepcopy(tiny_model).double().eval()
    folded = copy.deepcopy(double)
    fold_children(folded, FOLDS)
    images = torch.from_numpy(IMAGES).double()
    with torch.no_grad():
        a, b = double.encode(images), folded.encode(images)
        for name in a.latents:
            assert (a.latents[name] - b.latents[name]).abs().max() < 1e-10
        assert (a.log_prob - b.log_prob).abs().max() < 1e-8
        assert (double.decode(a.latents) - folded.decode(a.latents)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("route", "graphs"),
    [("forward", {"forward", "end_forward", "end_inverse"}), ("inverse", {"inverse"})],
)
def test_one_route(tiny_run: Path, tmp_path: Path, route: Any, graphs: set[str]) -> None:
    manifest = export_bundle(tiny_run / "model.safetensors", tmp_path / "b", IMAGES, route)
    assert set(manifest.graphs) == graphs
    assert manifest.verified
    other = {"forward": "inverse", "inverse": "forward"}[route]
    session = load(tmp_path / "b")
    with pytest.raises(BundleError, match=f"no '{other}' engine"):
        _ = session.inverse(IMAGES) if other == "inverse" else session.sample(1)


def test_graphs_share_their_constants(tiny_run: Path, tmp_path: Path) -> None:
    """One file holds what both routes use, once: less than the two routes hold apart."""
    bundle = tiny_run / "bundle"
    manifest = read_manifest(bundle)
    assert {manifest.graphs[name].weights for name in ("forward", "inverse")} == {("weights.bin",)}
    alone = 0
    for route in ("forward", "inverse"):
        export_bundle(tiny_run / "model.safetensors", tmp_path / route, IMAGES, route)  # type: ignore[arg-type]
        alone += (tmp_path / route / "weights.bin").stat().st_size
    assert (bundle / "weights.bin").stat().st_size < 0.7 * alone


def test_constants_are_told_apart_by_value(tmp_path: Path) -> None:
    shared = SharedWeights(tmp_path / "weights.bin")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype(np.float32) for size in (300, 2000, 300)]
    arrays.append(arrays[1].copy())
    tensors = [onnx.numpy_helper.from_array(array) for array in arrays]
    for tensor in tensors:
        shared.take(tensor)
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
    assert places[1] == places[3]
    assert len({place["offset"] for place in places}) == 3
    assert all(int(place["offset"]) % 64 == 0 for place in places)
    small = onnx.numpy_helper.from_array(arrays[0][:8])
    shared.take(small)
    assert not small.external_data
    for tensor, array in zip(tensors, arrays, strict=True):
        assert (onnx.numpy_helper.to_array(tensor, str(tmp_path)) == array).all()


def test_half_precision_weights(tiny_run: Path, tmp_path: Path) -> None:
    """The bundle holds the rounded model, in half the bytes, and its engines are that model."""
    manifest = export_bundle(tiny_run / "model.safetensors", tmp_path / "b", IMAGES, "forward", half=True)
    assert manifest.verified
    assert manifest.checkpoint["weights"] == "float16"
    assert manifest.checkpoint["exported_from"] == sha256(tiny_run / "model.safetensors")
    whole, rounded = (load_model(path / "model.safetensors") for path in (tiny_run, tmp_path / "b"))
    for name, value in whole.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], value.half().float())
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    images = load(tmp_path / "b").sample(2)
    assert 0 < np.abs(images - load(tiny_run).sample(2)).max() < 0.1


def test_the_std_that_samples_are_drawn_at(tiny_run: Path, tmp_path: Path) -> None:
    export_bundle(tiny_run / "model.safetensors", tmp_path / "b", IMAGES, "forward", std=["0.9", "z0=0.3"])
    assert load(tmp_path / "b").std == ["0.9", "z0=0.3"]
    assert load(tiny_run).std == ["0.7"]
    with pytest.raises(DataError, match="unknown latent 'z9' in std"):
        export_bundle(tiny_run / "model.safetensors", tmp_path / "c", IMAGES, "forward", std=["z9=0.3"])
    assert not (tmp_path / "c").exists()


def test_half_precision_refuses_what_it_cannot_hold(tiny_model: Any, tmp_path: Path) -> None:
    state = tiny_model.state_dict() | {"spread_z1": torch.tensor(1e5)}
    save_model(tmp_path / "model.safetensors", "hflow", tiny_model, state, {})
    with pytest.raises(CheckpointError, match="spread_z1 exceeds the range of half precision"):
        export_bundle(tmp_path / "model.safetensors", tmp_path / "b", IMAGES, half=True)
    assert not (tmp_path / "b").exists()


def test_parity_catches_a_changed_engine(tiny_run: Path, tmp_path: Path, tiny_model: Any) -> None:
    """Move one weight of the engine by one percent: the check must fail, say where, and unverify the bundle."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "bundle" / "forward.onnx"
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if len(t.dims) == 4 and t.dims[0] == 8)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[np.abs(values).argmax()] *= 1.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, path)
    _trust(run / "bundle", "forward.onnx")
    bundle = find_bundle(run)
    report = check_bundle(bundle, IMAGES, "onnx", "cpu")
    assert not report["passed"]
    assert any("forward.image" in line for line in report["failures"])
    assert not read_manifest(run / "bundle").verified
    assert run_parity(tiny_model, open_bundle(bundle, "torch", "cpu"), IMAGES)["passed"]


def test_parity_catches_a_changed_inner_graph(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "bundle" / "end_forward.onnx"
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if len(t.dims) == 2)
    tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, path)
    _trust(run / "bundle", "end_forward.onnx")
    report = check_bundle(find_bundle(run), IMAGES, "onnx", "cpu")
    assert set(report["graphs"]) == {"forward", "inverse", "end_forward", "end_inverse"}
    assert any("end_forward.u1" in line for line in report["failures"])


def test_parity_is_not_conclusive_where_float32_itself_fails() -> None:
    exact = np.zeros((1, 3, 2, 2))
    entry = compare(np.ones((1, 3, 2, 2), np.float32), exact, np.full((1, 3, 2, 2), 0.5, np.float32), picture=True)
    report = {"graphs": {}, "pooled": {"forward": {"image": entry}}}
    assert failures(report) == ["forward.image: not conclusive, torch float32 itself is off by 0.5"]


def test_every_image_is_used(tiny_run: Path, tiny_model: Any) -> None:
    images = np.random.default_rng(1).uniform(0, 1, (5, 3, 16, 16)).astype(np.float32)
    report = run_parity(tiny_model, load(tiny_run), images)
    batches = [case["batch"] for case in report["graphs"]["inverse"]]
    assert batches == [1, 3, 3, 3, 3, 3, 3]  # every image, then with noise in their bins twice as many
    assert report["pooled"]["inverse"]["log_prob"]["elements"] == sum(batches)
    assert report["images"] == 5


def test_check_refuses_a_changed_byte(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    data = bytearray((run / "bundle" / "inverse.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "bundle" / "inverse.onnx").write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"inverse.onnx was changed after export \(sha256"):
        check_bundle(find_bundle(run), IMAGES)


def test_an_interrupted_export_leaves_nothing(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "run_parity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_run / "model.safetensors", tmp_path / "b", IMAGES, "inverse")
    assert list(tmp_path.iterdir()) == []


def test_export_keeps_an_unverified_bundle(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for factors in ("FACTORS", "FACTORS_OF_FEW"):
        monkeypatch.setattr(f"hflow_rt.export.judging.{factors}", {"rms": 0.0, "max": 0.0})
    monkeypatch.setattr("hflow_rt.export.judging.ULPS", 0.0)
    manifest = export_bundle(tiny_run / "model.safetensors", tmp_path / "b", IMAGES, "inverse")
    assert not manifest.verified
    assert not read_manifest(tmp_path / "b").verified


def test_export_refuses_to_replace_something_else(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("keep me")
    with pytest.raises(BundleError, match="is not a bundle; choose another"):
        export_bundle(tiny_run / "model.safetensors", tmp_path / "photos", IMAGES)
    assert (tmp_path / "photos" / "cat.txt").read_text() == "keep me"


def test_export_refuses_bad_checkpoints(tiny_run: Path, tmp_path: Path) -> None:
    whole = (tiny_run / "model.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        export_bundle(cut, tmp_path / "b", IMAGES)
    assert not (tmp_path / "b").exists()


def test_export_refuses_unfolded_operators(tmp_path: Path) -> None:
    class Determinant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.linalg.det(x),)

    spec = GraphSpec(
        "forward", Determinant(), Determinant(), (TensorSpec("x", (3, 3), "latent"),), (TensorSpec("y", (), "score"),)
    )
    with pytest.raises(HFlowError, match="still holds Det"):
        export_graph(spec, tmp_path / "x.onnx", {}, SharedWeights(tmp_path / "weights.bin"))


# the graph that measures bits per dimension


@pytest.fixture(scope="module")
def measuring(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the graphs `inverse` and `bound`. Copy it before changing anything."""
    bundle = tmp_path_factory.mktemp("bound") / "bundle"
    export_bundle(tiny_run / "model.safetensors", bundle, IMAGES, "inverse", bound=True)
    return bundle


def test_the_bound_is_exported_on_request_and_proved(tiny_run: Path, measuring: Path, tiny_model: Any) -> None:
    manifest = read_manifest(measuring)
    assert set(manifest.graphs) == {"inverse", "bound"}
    assert manifest.verified
    assert manifest.parity is not None
    cases = manifest.parity["graphs"]["bound"]
    assert [case["batch"] for case in cases] == [1, 3, 3, 3]
    parts = [f"{n}.{part}" for n in ("end0", "end1", "z1") for part in ("prior", "log_det", "entropy")]
    parts += ["z0.prior", "z0.log_det", "z0.bins"]
    assert [tensor.name for tensor in manifest.graphs["bound"].outputs] == parts
    for case in cases:
        assert list(case["outputs"]) == parts
    pooled = manifest.parity["pooled"]["bound"]
    assert list(pooled) == parts
    assert all(entry["tolerance"]["max"] < 6e-5 for entry in pooled.values())
    counts = manifest.graphs["bound"].operators
    assert not counts.keys() & {"Log", "ScatterND", "MatMul", "Einsum", "Identity", "Where", "Gather"}
    assert run_parity(tiny_model, open_bundle(find_bundle(measuring), "torch", "cpu"), IMAGES)["passed"]


def test_the_bound_shares_the_constants(tiny_run: Path, measuring: Path) -> None:
    manifest = read_manifest(measuring)
    assert manifest.graphs["bound"].weights == manifest.graphs["inverse"].weights == ("weights.bin",)
    both = (tiny_run / "bundle" / "weights.bin").stat().st_size
    assert (measuring / "weights.bin").stat().st_size < 1.1 * both


def test_an_engine_measures_what_the_reference_measures(measuring: Path, tiny_model: Any) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    session = load(measuring, "onnx", "cpu")
    found, exact = (bits_per_dim(tiny_model, pixels, 3, 2, 2, session=which) for which in (session, None))
    for one, other in zip(found.bounds.values(), exact.bounds.values(), strict=True):
        assert one.total == pytest.approx(other.total, rel=1e-5)
        for a, b in zip(one.latents, other.latents, strict=True):
            for name, part in a.parts.items():
                assert part == pytest.approx(b.parts[name], rel=1e-5, abs=1e-6), (a.name, name)


@pytest.mark.parametrize("change", ["sign", "weight", "inputs"])
def test_parity_catches_a_changed_bound(measuring: Path, tmp_path: Path, change: str) -> None:
    """The log-determinant with the other sign, a weight off by one percent, two noises that changed places."""
    bundle = shutil.copytree(measuring, tmp_path / "bundle")
    proto = onnx.load(bundle / "bound.onnx")
    if change == "sign":
        (node,) = (node for node in proto.graph.node if "z1.log_det" in node.output)
        node.output[0] = "other"
        proto.graph.node.append(onnx.helper.make_node("Neg", ["other"], ["z1.log_det"]))
    elif change == "weight":
        tensor = next(t for t in proto.graph.initializer if len(t.dims) == 4 and t.dims[0] == 8)
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.flat[np.abs(values).argmax()] *= 1.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    else:
        swapped = {"end0.seen": "end0.known", "end0.known": "end0.seen"}
        for node in proto.graph.node:
            node.input[:] = [swapped.get(name, name) for name in node.input]
    onnx.save(proto, bundle / "bound.onnx")
    _trust(bundle, "bound.onnx")
    report = check_bundle(find_bundle(bundle), IMAGES, "onnx", "cpu")
    assert report["failures"]
    assert all(line.startswith("bound.") for line in report["failures"])
    assert not read_manifest(bundle).verified


def test_a_family_without_a_bound(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = HFlow.graphs
    monkeypatch.setattr(HFlow, "graphs", lambda m: {n: spec for n, spec in graphs(m).items() if n != "bound"})
    with pytest.raises(BundleError, match="the hflow family has no bound graph"):
        export_bundle(tiny_run / "model.safetensors", tmp_path / "b", IMAGES, bound=True)
    assert not (tmp_path / "b").exists()


def _trust(bundle: Path, name: str) -> None:
    """Rewrite the manifest so that the file as it is now counts as exported."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": sha256(bundle / name), "bytes": (bundle / name).stat().st_size}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
