"""Exported graphs of Glow: folded ones against float64, ONNX Runtime against float64, what is left in a graph."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.errors import DataError
from hflow_rt.export.bundle import export_bundle
from hflow_rt.layers.actnorm import ActNorm
from hflow_rt.manifest import Manifest
from hflow_rt.models.checkpoint import save_model
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.network import Glow
from hflow_rt.runtime.session import Session, load

CASES: dict[str, dict[str, Any]] = {
    "paper": {"lu": True},
    "repository": {
        "edge": "ones", "hidden": "bias", "moving": "first", "scale": "exp_sigmoid", "split_prior": False,
        "top_prior": "fixed", "bits": 5,
    },
    "classes": {"coupling": "additive", "permutation": "shuffle", "classes": ("boot", "coat", "dress")},
}  # fmt: skip
Exported = tuple[Glow, Session, Manifest]


def photographs(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Smooth images in [0, 1] at 8-bit levels."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, 16)
    start, right, down = (rng.uniform(0, 1, (count, 3, 1, 1)) for _ in range(3))
    mixed = start + (right - start) * ramp + (down - start) * ramp[:, None]
    return (np.rint(255 * np.clip(mixed, 0, 1)) / 255).astype(np.float32)


@pytest.fixture(scope="module", params=list(CASES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    steps = 2 if request.param == "paper" else 1
    model = Glow(GlowConfig(resolution=16, levels=2, steps=steps, hidden_channels=8, **CASES[request.param]))
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.init_from_batch(torch.from_numpy(photographs(32, 1)) - 0.5 + 0.02 * torch.randn(32, 3, 16, 16))
    for module in model.modules():
        if isinstance(module, ActNorm):
            module.shift.data += 0.05 * torch.randn_like(module.shift)
    folder: Path = tmp_path_factory.mktemp("glow")
    save_model(folder / "model.safetensors", "glow", model, model.state_dict(), {})
    bound = bool(model.config.classes)
    manifest = export_bundle(folder / "model.safetensors", folder / "bundle", photographs(4, 2), bound=bound)
    assert manifest.verified, manifest.parity["failures"] if manifest.parity else None
    return model.eval(), load(folder / "bundle", device="cpu"), manifest


def told(model: Glow, count: int) -> dict[str, Any]:
    options = len(model.config.classes)
    return {"labels": np.eye(options, dtype=np.float32)[np.arange(count) % options]} if options else {}


def test_graphs_hold_nothing_that_could_be_folded(exported: Exported) -> None:
    model, _, manifest = exported
    assert list(manifest.graphs) == ["forward", "inverse", *(["bound"] if model.config.classes else [])]
    for name, graph in manifest.graphs.items():
        steps = model.config.levels * model.config.steps
        priors = model.config.levels - 1 if model.config.split_prior else 0
        # three convolutions a subnet, one for actnorm and mixing together
        assert graph.operators["Conv"] == 4 * steps + priors, name
        assert not set(graph.operators) & {"MatMul", "Inverse", "Det", "Gather", "Where", "Loop", "RandomNormal"}
        assert graph.batch == (1, 64)
    forward = manifest.graphs["forward"]
    assert forward.operators["DepthToSpace"] == model.config.levels
    assert ("labels" in [tensor.name for tensor in forward.inputs]) == bool(model.config.classes)


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_onnx_is_the_model_in_float64(exported: Exported, batch: int) -> None:
    model, session, _ = exported
    reference = copy.deepcopy(model).double()
    x, given = photographs(batch, 10 + batch), told(model, batch)
    doubles = {name: torch.from_numpy(value).double() for name, value in given.items()}
    with torch.no_grad():
        expected = reference.encode(torch.from_numpy(x).double(), doubles)
    found = session.inverse(x, given)
    for name, z in expected.latents.items():
        assert np.abs(found.latents[name] - z.numpy()).max() < 1e-5 * max(1.0, float(z.abs().max()))
    assert np.abs(found.log_prob - expected.log_prob.numpy()).max() < 1e-5 * float(expected.log_prob.abs().max())
    rng = np.random.default_rng(batch)
    latents = {n: rng.normal(size=(batch, *s)).astype(np.float32) for n, s in model.latent_shapes().items()} | given
    with torch.no_grad():
        image = reference.decode({name: torch.from_numpy(value).double() for name, value in latents.items()})
    assert np.abs(session.forward(latents) - image.numpy()).max() < 1e-5
    bits = session.bits_per_dim(found.log_prob)
    exact = reference.config.bits - expected.log_prob.numpy() / (3 * 16 * 16 * np.log(2))
    assert np.abs(bits - exact).max() < 1e-4


def test_every_level_comes_back_exactly(exported: Exported) -> None:
    model, session, _ = exported
    x = photographs(8, 30)
    back = session.forward(session.inverse(x, told(model, 8)).latents)
    assert np.array_equal(np.rint(back * 255), np.rint(x * 255))


def test_what_the_model_is_told_must_fit(exported: Exported) -> None:
    model, session, _ = exported
    x, given = photographs(2, 40), told(model, 2)
    wanted = r"labels \[2, 3\]" if given else "nothing"
    wrong = [{"labels": np.ones((2, 5), np.float32)}, {**given, "size": np.ones((2, 1), np.float32)}]
    for conditions in [*wrong, *([{}, {"labels": given["labels"].astype(np.float64)}] if given else [])]:
        with pytest.raises(DataError, match=f"beside images this model needs {wanted}, float32 one-hot; received "):
            session.inverse(x, conditions)
    latents = next(session.draw(range(2)))
    with pytest.raises(DataError, match="unexpected size"):
        session.forward(latents | {"size": np.ones((2, 1), np.float32)})


def test_labels_that_are_no_class(exported: Exported) -> None:
    model, session, _ = exported
    x, given = photographs(2, 40), told(model, 2)
    if not given:
        assert not session.conditions
        return
    latents = next(session.draw(range(2)))
    half = np.full((2, 3), 1 / 3, np.float32)
    session.forward(latents | {"labels": half})
    for wrong in (np.full((2, 3), np.nan, np.float32), given["labels"] * 2, given["labels"] * 0):
        with pytest.raises(DataError, match=r"^labels must be one-hot, or a mixture"):
            session.inverse(x, {"labels": wrong})
        with pytest.raises(DataError, match=r"labels must be one-hot|labels holds NaN"):
            session.forward(latents | {"labels": wrong})
        with pytest.raises(DataError, match="labels must be one-hot"):
            session.inverse(torch.from_numpy(x), {"labels": torch.from_numpy(wrong)})


def test_torch_backend_runs_the_same_graphs(exported: Exported) -> None:
    model, session, _ = exported
    other = load(session.bundle.path, backend="torch", device="cpu")
    latents = next(session.draw(range(3), 0.8, seed=5))
    assert ("labels" in latents) == bool(model.config.classes)
    assert np.abs(session.forward(latents) - other.forward(latents)).max() < 1e-5
