"""Every family keeps the contract: built, saved, exported, proved, sampled, encoded or refused, trained, resumed.

A new family is tested by registering it. The toys stand for what no registered family has yet.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import hflow_rt
from hflow_rt.conditions import in_turn
from hflow_rt.errors import ConfigError, DataError, NoInverse
from hflow_rt.evaluation.bits import BitsReport, bits_per_dim
from hflow_rt.evaluation.steps import bits_by_step
from hflow_rt.export.bundle import export_bundle
from hflow_rt.export.mixed_precision import to_mixed_precision
from hflow_rt.manifest import Manifest, graphs_of, read_manifest
from hflow_rt.models.checkpoint import load_model, save_model
from hflow_rt.models.family import LatentModel, Loop
from hflow_rt.models.registry import FAMILIES, Family, family
from hflow_rt.runs import checkpoints
from hflow_rt.runtime import load
from hflow_rt.runtime.latents.latent_views import stepped
from hflow_rt.runtime.session import Session
from hflow_rt.training.config import RunConfig, load_config
from hflow_rt.training.trainer import train

sys.path.insert(0, str(Path(__file__).parent))  # the toys are found by name
TOYS = {
    "toy-generator": "toy_generator",
    "toy-adversarial": "toy_adversarial",
    "toy-loop": "toy_loop",
    "colour": "family_of_the_docs",
    "grey": "toy_grey",
}
DOCS = Path(__file__).parents[2] / "docs" / "families.md"
NAMES = [*FAMILIES, *TOYS]


@pytest.fixture(scope="module", autouse=True)
def _toys(docs_family: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for name, module in TOYS.items():
            patched.setitem(FAMILIES, name, module)
        yield


class Pictures:
    """24 smooth images in folders named after the classes of a model, the last fourth held out."""

    def __init__(self, model: LatentModel, count: int = 24) -> None:
        corners = torch.rand(count, model.channels, 2, 2, generator=torch.Generator().manual_seed(0))
        smooth = torch.nn.functional.interpolate(corners, model.resolution, mode="bilinear", align_corners=True)
        self.array = (255 * smooth).round().to(torch.uint8).numpy()
        classes = next(iter(model.conditions().values()), ("all",))
        self.names = [f"{classes[index % len(classes)]}/{index:02d}.png" for index in range(count)]
        self.hash = hashlib.sha256(self.array.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, indices: NDArray[np.integer]) -> NDArray[np.uint8]:
        return self.array[indices]

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        held_out = np.arange(len(self)) >= len(self) * 3 // 4
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@dataclass(frozen=True)
class Made:
    """A tiny model of a family, its pictures and its bundle."""

    family: Family
    config: RunConfig
    model: LatentModel
    pictures: Pictures
    folder: Path
    manifest: Manifest

    @property
    def images(self) -> NDArray[np.float32]:
        return self.pictures.array[:3].astype(np.float32) / 255


# exported once for all tests
SHARED = {"ihdm": "many_steps", "inrgan": "slots_run"}


@pytest.fixture(scope="module", params=NAMES)
def made(
    request: pytest.FixtureRequest, tiny: Callable[[Family], LatentModel], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    found = family(request.param)
    config = load_config(file={"family": found.name, **found.tiny})
    model = tiny(found)
    pictures = Pictures(model)
    folder = tmp_path_factory.mktemp(found.name)
    if found.name in SHARED:
        shutil.copytree(request.getfixturevalue(SHARED[found.name]), folder, dirs_exist_ok=True)
        return Made(found, config, model, pictures, folder, read_manifest(folder / "bundle"))
    save_model(folder / "model.safetensors", found.name, model, model.state_dict(), {"images": 0})
    images = pictures.array[:3].astype(np.float32) / 255
    manifest = export_bundle(folder / "model.safetensors", folder / "bundle", images)
    return Made(found, config, model, pictures, folder, manifest)


@pytest.fixture(scope="module")
def session(made: Made) -> Session:
    return load(made.folder)


def test_weights_come_back(made: Made) -> None:
    again = load_model(made.folder / "model.safetensors")
    state = made.model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert again.config == made.model.config


def test_graphs_are_described(made: Made) -> None:
    model, graphs = made.model, made.model.graphs()
    routes = model.routes()
    assert routes.keys() | model.absent().keys() == {"forward", "inverse"}
    assert not routes.keys() & model.absent().keys()
    ways = (*routes.values(), *(space for space in model.spaces().values()))
    assert {name for way in ways for name in graphs_of(way)} <= graphs.keys()
    latents, conditions = model.latent_shapes(), model.conditions()
    for name, spec in graphs.items():
        assert spec.name == name
        for tensors in (spec.inputs, spec.outputs):
            assert len({tensor.name for tensor in tensors}) == len(tensors)
        for tensor in (*spec.inputs, *spec.outputs):
            assert (tensor.role == "latent") == (tensor.name in latents)
            assert (tensor.role == "condition") == (tensor.name in conditions)
            assert (tensor.role == "image") == (tensor.name == "image")
            assert (tensor.role == "score") <= (tensor.shape == ())
            assert (
                (tensor.role == "control")
                <= (tensor.default is not None)
                <= (tensor.role in ("control", "noise", "grid"))
            )
    enter = {"forward": "latent", "inverse": "image"}
    for route, way in routes.items():
        first, last = (graphs[graphs_of(way)[place]] for place in (0, -1))
        roles = {tensor.role for tensor in first.inputs}
        assert {enter[route]} <= roles <= {enter[route], "noise", "uniform", "condition", "control"}
        if isinstance(way, Loop):
            inputs, outputs = ({t.name: t for t in tensors} for tensors in (last.inputs, last.outputs))
            assert {name for name, tensor in inputs.items() if tensor.role == "schedule"} == way.schedule.keys()
            assert all(table.shape == (way.steps, *inputs[name].shape) for name, table in way.schedule.items())
            assert all(inputs[entered].shape == outputs[left].shape for left, entered in way.carry.items())
            assert {*way.carry, *way.last, *way.every} <= outputs.keys()
            yielded = [*(t.name for t in first.outputs if t.name in latents), *way.last, *way.every.values()]
        else:
            yielded = [tensor.name for tensor in last.outputs]
        if route == "forward":
            assert yielded == ["image"]
            assert last.outputs[-1].range == (0, 1)
        else:
            assert yielded[: len(latents)] == list(latents)


def test_every_graph_is_proved(made: Made) -> None:
    manifest = made.manifest
    assert manifest.parity is not None
    assert manifest.verified, manifest.parity["failures"]
    for name, graph in manifest.graphs.items():
        assert manifest.parity["pooled"][name].keys() == {tensor.name for tensor in graph.outputs}
        assert all(entry["scale"] > 0 for entry in manifest.parity["pooled"][name].values())
    assert ("round_trip" in manifest.parity["pooled"]) == (made.model.round_trip() == "exact")
    for route, way in made.model.routes().items():
        assert (f"{route} loop" in manifest.parity["pooled"]) == isinstance(way, Loop)
    assert read_manifest(made.folder / "bundle") == manifest
    assert {route: graphs_of(way) for route, way in manifest.routes.items()} == {
        route: graphs_of(way) for route, way in made.model.routes().items()
    }
    specs = made.model.graphs()
    for name, graph in manifest.graphs.items():
        spec = specs[name]
        assert [tensor.role for tensor in graph.inputs] == [tensor.role for tensor in spec.inputs]


def test_nets_may_be_in_half_precision(made: Made, session: Session) -> None:
    spec, graph = made.model.graphs().get("forward"), made.manifest.graphs.get("forward")
    if spec is None or graph is None or not spec.nets:
        return
    proto = onnx.load(str(made.folder / "bundle" / graph.file))
    assert to_mixed_precision(proto, spec.nets, spec.heads) > 4
    (latents,) = session.draw([0, 1], std=1.0)
    engine = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (image,) = engine.run(None, {tensor.name: latents[tensor.name] for tensor in graph.inputs})
    difference = image - session.forward(latents)
    assert 0 < np.square(difference).mean() < 1e-5  # 50 dB


def test_an_image_of_a_seed_is_the_same_in_any_batch(made: Made, session: Session) -> None:
    std = 1 if session.drawing.scaled else None
    whole = session.sample(5, std=std, seed=3)
    side = made.model.resolution
    assert whole.shape == (5, made.model.channels, side, side)
    assert whole.dtype == np.float32
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert np.std(whole, axis=0).max() > 1e-3  # images differ
    parts = np.concatenate([session.forward(part) for part in session.draw([4, 1], std, 3, batch=1)])
    np.testing.assert_allclose(parts, whole[[4, 1]], atol=2e-4)
    with load(made.folder, backend="torch") as reference:
        np.testing.assert_allclose(reference.sample(5, std=std, seed=3), whole, atol=2e-3)


def test_std_is_for_priors_with_a_temperature(made: Made, session: Session) -> None:
    prior = made.model.prior()
    scaled = [name for name in session.latent_shapes if prior.get(name, "normal") == "normal"]
    for name in session.latent_shapes:
        if name in scaled:
            one, other = (session.sample(2, std={name: std}, seed=1) for std in (0.2, 1.0))
            assert np.abs(one - other).max() > 1e-4
    if not scaled:
        with pytest.raises(DataError, match="no std applies"):
            session.sample(2, std=0.7)
    if made.model.bank():
        bank = {name: rows.numpy() for name, rows in made.model.bank().items()}
        for name, values in next(iter(session.draw(range(9)))).items():
            if name in bank:
                assert all(any(np.array_equal(value, row) for row in bank[name]) for value in values)
                assert len({value.tobytes() for value in values}) > 1


def test_spaces_lead_to_the_same_image(session: Session) -> None:
    (latents,) = session.draw([0, 1])
    image = session.forward(latents)
    for space in session.spaces:
        values = session.into_space(space, latents)
        assert {name: tuple(value.shape[1:]) for name, value in values.items()} == session.space_shapes(space)
        np.testing.assert_allclose(session.decode(space, values), image, atol=1e-4)


def test_images_on_the_way_between_two_samples(session: Session) -> None:
    """The first of each pair is a sample of the seed, the last another one; a small step changes little."""
    first, same = stepped(session, range(1, 3), 0.0)
    np.testing.assert_array_equal(first, same)
    drawn = next(session.draw([1, 2], seed=0))
    np.testing.assert_allclose(first, session.forward(drawn), atol=1e-4)
    _, near = stepped(session, range(1, 3), 1e-3)
    _, far = stepped(session, range(1, 3), 1.0)
    assert 0 < np.abs(near - first).max() < np.abs(far - first).max()


def test_pixels_are_drawn_or_refused(session: Session) -> None:
    (latents,) = session.draw([0, 1, 2])
    if not any(space.draw for space in session.manifest.spaces.values()):
        with pytest.raises(DataError, match="no distributions to draw pixels from"):
            session.drawn_pixels(latents)
        return
    drawn = session.drawn_pixels(latents, seed=1)
    np.testing.assert_array_equal(session.sample(3, seed=0, pixels=True), session.drawn_pixels(latents, seed=0))
    np.testing.assert_array_equal(
        session.drawn_pixels({n: z[2:] for n, z in latents.items()}, seed=1, first=2), drawn[2:]
    )
    many = np.mean([session.drawn_pixels(latents, seed=seed) for seed in range(200)], axis=0)
    mean = session.forward(latents)
    assert np.abs(many - mean).mean() < 0.1 < np.abs(drawn - mean).mean()  # clipped draws have another mean


def test_latents_of_a_posterior_are_drawn_or_refused(made: Made, session: Session) -> None:
    if "inverse" not in made.model.routes():
        return
    told = in_turn(session.conditions, range(3))
    if all(tensor.default is None for tensor in session.drawing.inputs("noise", route="inverse")):
        with pytest.raises(DataError, match="no posterior to draw latents from"):
            session.inverse(made.images, told, posterior=True)
        return
    drawn = [session.inverse(made.images, told, seed=seed, posterior=True).latents for seed in (1, 2)]
    rest = {name: values[1:] for name, values in told.items()}
    part = session.inverse(made.images[1:], rest, seed=1, first=1, posterior=True).latents
    for name, mean in session.inverse(made.images, told).latents.items():
        np.testing.assert_allclose(part[name], drawn[0][name][1:], atol=1e-4)
        assert min(np.abs(a - b).mean() for a, b in ((mean, drawn[0][name]), (drawn[0][name], drawn[1][name]))) > 0.1


def test_controls(session: Session) -> None:
    (latents,) = session.draw([0, 1])
    plain = session.forward(latents)
    assert np.array_equal(session.forward(latents, session.controls), plain)
    for name in session.controls:
        low = {control.name: control.range[0] for control in session.drawing.inputs("control") if control.range}[name]
        changed = session.forward(latents, {name: low})
        assert np.abs(changed - plain).max() > 1e-2
        np.testing.assert_array_equal(session.sample(2, controls={name: low}), changed)
        for impossible in (-1e9, float("nan")):
            with pytest.raises(DataError, match=f"control {name} must be a number in"):
                session.forward(latents, {name: impossible})
    with pytest.raises(DataError, match="unknown control 'nothing'"):
        session.forward(latents, {"nothing": 1.0})


def test_images_come_back_or_are_refused(made: Made, session: Session, tmp_path: Path) -> None:
    told = in_turn(session.conditions, range(3))
    if "inverse" in made.model.routes():
        found = session.inverse(made.images, told)
        assert found.latents.keys() == session.input_shapes.keys()
        back = session.forward(found.latents)
        if made.model.round_trip() == "exact":
            np.testing.assert_allclose(back, made.images, atol=1e-3)
            return
        with load(made.folder, backend="torch") as reference:
            again = reference.forward(reference.inverse(made.images, told).latents)
        np.testing.assert_allclose(back, again, atol=1e-3)
        return
    sentence = made.model.absent()["inverse"]
    with pytest.raises(NoInverse) as refused:
        session.inverse(made.images)
    assert str(refused.value) == sentence
    with pytest.raises(NoInverse) as refused:
        export_bundle(made.folder / "model.safetensors", tmp_path / "b", made.images, "inverse")
    assert str(refused.value) == sentence
    assert not (tmp_path / "b").exists()


def test_another_view_of_the_images_or_none(made: Made) -> None:
    side = made.model.resolution
    view = {"resolution": 2 * side, "region": (0.0, 0.5, 0.5, 1.0)}
    if "view" not in type(made.model.config).model_fields:
        with pytest.raises(ConfigError, match="have one size; omit --resolution and --region"):
            hflow_rt.load(made.folder, **view)
        return
    with hflow_rt.load(made.folder, **view) as large, load(made.folder) as plain:
        assert large.verified
        assert large.bundle.path == made.folder / f"bundle-{2 * side}-0,0.5,0.5,1"
        found, image = large.sample(2, seed=1), plain.sample(2, seed=1)
        np.testing.assert_allclose(found[:, :, ::4, ::4], image[:, :, side // 2 :, : side // 2], atol=1e-4)
        written = (large.bundle.path / "manifest.json").stat().st_mtime_ns
    with hflow_rt.load(made.folder, **view) as again:
        assert (again.bundle.path / "manifest.json").stat().st_mtime_ns == written


def test_a_resumed_run_is_the_run_that_was_never_stopped(made: Made, tmp_path: Path) -> None:
    def run(name: str, images: int, resume: bool = False) -> dict[str, Any]:
        train(made.config, made.pictures, tmp_path / name, images=images, resume=resume)
        state: dict[str, Any] = load_file(checkpoints(tmp_path / name)[-1] / "state.safetensors")
        return state

    whole = run("whole", 8)
    first = run("parts", 4)
    parts = run("parts", 8, resume=True)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert any(not torch.equal(value, first[name]) for name, value in whole.items() if name.startswith("model/"))
    # only the model ships; what else trains is in the checkpoint, and has changed
    model, plan = made.model.state_dict().keys(), made.model.plan(made.config.training)
    beside = [name for name in plan.state_dict() if not name.startswith("model.")]
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == model
    kinds = {kind: {name for name in whole if name.startswith(f"{kind}/")} for kind in ("model", "average", "plan")}
    assert kinds == {
        "model": {f"model/{name}" for name in model},
        "average": {f"average/{name}" for name in model},
        "plan": {f"plan/{name}" for name in beside},
    }
    assert all(not torch.equal(whole[name], first[name]) for name in kinds["plan"])
    moments = {name.split("/")[1] for name in whole.keys() - set().union(*kinds.values())}
    assert moments == {phase.optimizer for phase in plan.phases()} == plan.groups().keys()


def test_it_is_measured_or_says_why_not(made: Made) -> None:
    def found(batch: int) -> BitsReport:
        return bits_per_dim(made.model, made.pictures.array[:4], batch=batch, names=made.pictures.names[:4])

    if not made.model.bounds():
        with pytest.raises(ConfigError, match="no likelihood"):
            found(4)
        return
    whole, parts = found(4), found(3)
    assert whole.reasons == {}
    assert list(whole.bounds) == list(parts.bounds) == list(made.model.bounds())
    for one, other in zip(whole.bounds.values(), parts.bounds.values(), strict=True):
        assert 0 < one.total.mean < 64
        assert other.total.mean == pytest.approx(one.total.mean, rel=1e-5)


def test_each_step_is_measured_where_there_are_steps(made: Made) -> None:
    loop = made.model.routes()["forward"]
    if type(made.model).bits_by_step is LatentModel.bits_by_step:
        with pytest.raises(ConfigError, match="no steps to tell apart"):
            bits_by_step(made.model, made.pictures.array[:1])
        return
    assert isinstance(loop, Loop)
    whole, parts = (bits_by_step(made.model, made.pictures.array[:3], batch=batch) for batch in (3, 2))
    assert len(whole.calls) == loop.steps
    assert 0 < whole.total < 64
    for one, other in zip(whole.calls, parts.calls, strict=True):
        assert (one.n, other.mean) == (3, pytest.approx(one.mean, rel=1e-5, abs=1e-6))
