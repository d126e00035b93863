"""A plan of three phases and two optimizers: the toy generator against its discriminator."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from typer.testing import CliRunner

from hflow_rt.cli.__main__ import app
from hflow_rt.errors import BackendUnavailable, ConfigError, TrainingError
from hflow_rt.evaluation import while_training
from hflow_rt.evaluation.features import FeatureNetwork
from hflow_rt.models.checkpoint import build_model
from hflow_rt.models.plan import Place
from hflow_rt.models.registry import FAMILIES
from hflow_rt.runs import checkpoints
from hflow_rt.runtime.training import samples
from hflow_rt.streams import stream_seed
from hflow_rt.training.batches import MicroBatches
from hflow_rt.training.config import load_config
from hflow_rt.training.log import Progress
from hflow_rt.training.processes import Processes
from hflow_rt.training.schedule import learning_rates
from hflow_rt.training.stop import StopRequest
from hflow_rt.training.trainer import train

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # the toys are found by name

NAME = "toy-adversarial"


@pytest.fixture(autouse=True)
def _adversarial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, NAME, "toy_adversarial")


def _state(run: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(checkpoints(run)[-1] / "state.safetensors")
    return tensors


def test_steps_are_those_of_a_plain_loop(images: Any, tmp_path: Path) -> None:
    """Generator, discriminator and in every second step the penalty, each with its settings, rates along a cosine."""
    config = load_config(NAME, overrides=["training.accumulate=2"])
    train(config, images, tmp_path / "run", images=24, device="cpu")
    found, training = _state(tmp_path / "run"), config.training

    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        plan: Any = build_model(NAME, config.model).plan(training).train()
        critic = plan.discriminator.parameters()
        adams = [
            torch.optim.Adam(plan.model.parameters(), betas=(0.9, 0.999)),
            torch.optim.Adam(critic, betas=(0.0, 0.99), weight_decay=1e-2),
        ]
        average = [p.detach().clone() for p in plan.model.parameters()]
        batches = MicroBatches(plan, images, images.split()[0], training, Processes("cpu", "no"))
        place = Place(total=24)
        while place.images < 24:
            rates = learning_rates(training, place.images)
            sure = []
            for phase in (0, 1, 2) if place.step % 2 == 0 else (0, 1):
                plan.zero_grad()
                for micro in (0, 1):
                    torch.manual_seed(stream_seed(training.seed, place.step, micro, 0, phase, 1))
                    name = ("generator", "discriminator", "penalty")[phase]
                    terms = plan.loss(name, batches.get(place, micro, phase), place)
                    (terms.loss / 2).backward()
                    sure += [float(terms.terms["sure"])] if phase == 1 else []
                adam = adams[min(phase, 1)]
                adam.param_groups[0]["lr"] = rates["discriminator" if phase else "plane"]
                adam.step()
            plan.confidence.lerp_(torch.tensor(np.mean(sure)).float(), 0.5)
            half_life = min(20, 0.5 * place.images)
            weight = 1 - 0.5 ** (8 / half_life) if half_life else 1
            for held, new in zip(average, plan.model.parameters(), strict=True):
                held.lerp_(new.detach(), weight)
            place = Place(place.step + 1, place.images + 8, 24)
    assert found["plan/seen"] == plan.seen == 24
    for name, value in plan.state_dict().items():
        stored = found[f"model/{name[6:]}" if name.startswith("model.") else f"plan/{name}"]
        torch.testing.assert_close(stored, value, atol=1e-6, rtol=1e-5)
    for (name, _), value in zip(plan.model.named_parameters(), average, strict=True):
        torch.testing.assert_close(found[f"average/{name}"], value, atol=1e-6, rtol=1e-5)
    assert found["optimizer/discriminator/step/discriminator.1.bias"] == 3 + 2
    assert found["optimizer/generator/step/model.plane.bias"] == 3


def test_other_optimizers_parameters_get_no_gradient(images: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import toy_adversarial

    loss, seen = toy_adversarial.AdversarialPlan.loss, []

    def watched(self: Any, phase: str, *given: Any) -> Any:
        seen.append((phase, *(next(m.parameters()).requires_grad for m in (self.model, self.discriminator))))
        return loss(self, phase, *given)

    monkeypatch.setattr(toy_adversarial.AdversarialPlan, "loss", watched)
    train(load_config(NAME), images, tmp_path / "run", images=8, device="cpu")
    steps = [("generator", True, False), ("discriminator", False, True), ("penalty", False, True)]
    assert seen[-5:] == [*steps, *steps[:2]]


@pytest.mark.parametrize(("calls", "images_then"), [(1, 8), (3, 16)])
def test_a_stop_inside_a_step(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, images_then: int
) -> None:
    """In the second step: in its first phase it is dropped, what the loss moved too; later the step is ended first."""
    import toy_adversarial

    loss, request, count = toy_adversarial.AdversarialPlan.loss, StopRequest(), [0]

    def counted(self: Any, phase: str, batch: Any, place: Place) -> Any:
        self.seen += 1
        count[0] += place.step == 1
        request.asked |= count[0] == calls
        return loss(self, phase, batch, place)

    config = load_config(NAME, overrides=["training.accumulate=2"])
    monkeypatch.setattr("hflow_rt.training.run.check_batch", lambda *given: None)  # which tries the loss as well
    monkeypatch.setattr(toy_adversarial.AdversarialPlan, "loss", counted)
    with monkeypatch.context() as patch:
        patch.setattr("hflow_rt.training.trainer.StopRequest", lambda: request)
        stopped = train(config, images, tmp_path / "run", images=24, device="cpu")
    assert (stopped.stopped_by, stopped.images) == ("interrupt", images_then)
    train(config, images, tmp_path / "run", images=24, device="cpu", resume=True)
    train(config, images, tmp_path / "straight", images=24, device="cpu")
    a, b = _state(tmp_path / "run"), _state(tmp_path / "straight")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_figures_and_the_loss_are_told(images: Any, tmp_path: Path) -> None:
    """A model without likelihood has figures of its own in the terminal, as JSON, and in checkpoints."""
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for name, pixels in zip(images.names, images.array, strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "pictures" / name)
    arguments = ["--preset", NAME, "--data", tmp_path / "pictures", "--images", 8, "--device", "cpu"]
    told, as_json = (
        CliRunner().invoke(app, ["train", *map(str, arguments), "--out", str(tmp_path / name), *more])
        for name, more in (("a", ()), ("b", ("--json",)))
    )
    assert told.exit_code == 0, told.output
    final = json.loads(as_json.stdout)["final"]["figures"]["off"]
    title = f"{final['mean']:.4g} ± {final['standard_error']:.3f} from the middle of the prior to images"
    assert told.stdout.splitlines()[1] == "on 5 held-out images:"
    assert told.stdout.splitlines()[3] == f"  now: {title}"
    assert f"8 images  {told.stderr.splitlines()[-1].split('  ')[1]}  held-out {title}" in told.stderr
    about = json.loads((checkpoints(tmp_path / "a")[-1] / "state.json").read_text())
    assert about["last"]["figures"]["off"] == final


def test_without_figures_the_reason_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy-generator", "toy_generator")
    arguments = [
        "train",
        "--preset",
        "toy-generator",
        "--images",
        "8",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]

    def absent(*_: Any) -> None:
        raise BackendUnavailable("the features need a package")

    monkeypatch.setattr(while_training, "open_features", absent)
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[1] == "nothing was measured: the features need a package"
    assert told.output.count("features") == 1
    assert re.search(r"^8 images  [\d.]+ images/s  loss 0\.\d+  0:00 left$", told.stderr, re.MULTILINE)


def test_mistakes(images: Any, tmp_path: Path) -> None:
    config = load_config(NAME, overrides=["training.optimizers.critic.eps=1e-3"])
    with pytest.raises(ConfigError, match=r"optimizers\.critic names no optimizer; .* has generator, discriminator$"):
        train(config, images, tmp_path / "run")
    config = load_config(NAME, overrides=["training.learning_rates.discriminator=1e30"])
    with pytest.raises(TrainingError, match=r"step 0 .* is (inf|nan).* training.grad_clip \(now none\)"):
        train(config, images, tmp_path / "run")


def test_a_frozen_optimizer_takes_no_phase(images: Any, tmp_path: Path) -> None:
    config = load_config(NAME, overrides=['training.frozen=["discriminator.*"]'])
    train(config, images, tmp_path / "run", images=8, device="cpu")
    found = _state(tmp_path / "run")
    assert found["plan/seen"] == 0
    assert not any(name.startswith("optimizer/discriminator") for name in found)


def test_without_likelihood_distances_are_measured_and_warnings_told(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_generator

    monkeypatch.setitem(FAMILIES, "toy-generator", "toy_generator")
    network = FeatureNetwork("means", "FD", "KD", "0" * 64, "k", 3, lambda pixels: pixels.mean((2, 3), np.float32))
    monkeypatch.setattr(while_training, "open_features", lambda *_: network)
    told: list[dict[str, float]] = []

    def warning(self: Any, means: Any) -> str | None:
        told.append(dict(means))
        return "it goes wrong" if len(told) == 2 else None

    monkeypatch.setattr(toy_generator.ToyPlan, "warning", warning)
    config = load_config("toy-generator", overrides=["training.evaluate_every_images=8", "training.evaluate_samples=5"])
    seen: list[Progress] = []
    result = train(config, images, tmp_path / "run", images=16, device="cpu", draw=samples, on_progress=seen.append)
    found = [(one.evaluation, one.warning) for one in seen if one.evaluation is not None]
    assert [one.images for one, _ in found] == [0, 8, 16]
    assert [line for _, line in found] == [None, "it goes wrong", None]
    assert all(one.of == "samples" and list(one.figures) == ["frechet", "kernel"] for one, _ in found)
    assert result.final is not None
    assert result.final.figures["frechet"].estimate.n == 5
    assert [sorted(means) == [] for means in told] == [True, False, False]
    assert told[1]["terms/error"] != told[2]["terms/error"]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"samples/frechet", "samples/kernel"} <= set(events.Tags()["scalars"])
    assert events.Tags()["tensors"] == ["warning/text_summary"]
