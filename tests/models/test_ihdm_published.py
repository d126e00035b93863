"""Checkpoints as the published IHDM writes them: the average is taken, moments come along, misfits are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from hflow_rt.errors import CheckpointError, ConfigError, DataError
from hflow_rt.foreign.importing import import_published
from hflow_rt.models.checkpoint import load_model, load_state
from hflow_rt.models.ihdm.bank import known
from hflow_rt.models.ihdm.model import IHDM
from hflow_rt.models.ihdm.published import read_published, read_training_state
from hflow_rt.runtime.in_memory import session_of

CASE = Path(__file__).parents[1] / "golden" / "ihdm" / "a_rgb16"
SETTINGS = {"resolution": 16, "steps": 8, "blur_max": 8.0}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A network's under published names, in published order."""
    stored = load_file(CASE.with_suffix(".weights.safetensors"))
    order = json.loads(CASE.with_suffix(".json").read_text())["weights"]["parameter_order"]
    return {name: stored[name] for name in order}


Save = Callable[..., Path]


@pytest.fixture
def save(weights: dict[str, Tensor], tmp_path: Path) -> Save:
    """Writes a checkpoint; `change` may spoil it before."""

    def made(change: Callable[[dict[str, Any]], object] = lambda checkpoint: None) -> Path:
        listed = list(weights.values())
        states = {
            index: {"step": torch.tensor(3.0), "exp_avg": tensor * 3, "exp_avg_sq": tensor * 4}
            for index, tensor in enumerate(listed)
        }
        group = {"lr": np.float64(1e-4), "betas": (0.9, 0.999), "params": list(range(len(listed)))}
        checkpoint = {
            "optimizer": {"state": states, "param_groups": [group]},
            "model": dict(weights),
            "step": 7,
            "ema": {"decay": 0.999, "num_updates": 6, "shadow_params": [tensor * 2 for tensor in listed]},
        }
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "checkpoint_1.pth")
        return tmp_path / "checkpoint_1.pth"

    return made


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Path]:
    def made(**changes: Any) -> Path:
        values = {name: value for name, value in (SETTINGS | changes).items() if value is not None}
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(values))
        return path

    return made


def test_the_average_is_taken_and_fits(save: Save, settings: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    path = save()
    average, trained = (read_published(path, settings(), part) for part in (None, "model"))
    assert (average.part, average.prefix) == ("ema", "module.")
    assert average.passed_over["model"] == "128 tensors"
    assert (trained.part, average.config.bank) == ("model", 0)
    assert (average.config.widths, average.config.attention, average.config.blocks) == ((2, 4), (1,), 1)
    load_state(IHDM(average.config), average.state, "average")
    for found, factor in ((average, 2), (trained, 1)):
        assert torch.equal(found.state["network.head.weight"], factor * weights["module.out.2.weight"])
        one = factor * weights["module.middle_block.1.qkv.weight"][:, :, 0]
        assert torch.equal(found.state["network.middle.0.attention.qkv.weight"], one)


def test_a_run_goes_on_from_it(save: Save, weights: dict[str, Tensor]) -> None:
    def with_older_torch(checkpoint: dict[str, Any]) -> None:
        for state in checkpoint["optimizer"]["state"].values():
            state["step"] = 3

    for change in (lambda checkpoint: None, with_older_torch):
        found = read_training_state(save(change))
        assert (found.step, found.average_updates, found.adam_step) == (7, 6, 3)
        stem = weights["module.input_blocks.0.0.weight"]
        name = "network.down.0.conv.weight"
        for factor, tensors in enumerate((found.weights, found.average, *found.moments), 1):
            assert len(tensors) == 128
            assert torch.equal(tensors[name], factor * stem)


def test_bare_weights(settings: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path) -> None:
    bare = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    found = read_published(tmp_path / "bare.safetensors", settings())
    assert (found.part, found.prefix) == (".", "")
    assert torch.equal(found.state["network.norm.bias"], weights["module.out.0.bias"])


def test_settings_that_do_not_belong_to_it(save: Save, settings: Callable[..., Path], tmp_path: Path) -> None:
    path = save()
    with pytest.raises(
        ConfigError, match=r'does not say resolution and steps and blur_max; .* \{"preset": "ihdm-cifar"\}'
    ):
        read_published(path)
    with pytest.raises(ConfigError, match=r"blocks is 2, and .* has 1"):
        read_published(path, settings(blocks=2))
    with pytest.raises(ConfigError, match=r"widths is \(1, 2, 2, 2\), and .* has \(2, 4\)"):
        read_published(path, settings(preset="ihdm-cifar"))
    with pytest.raises(ConfigError, match=r"preset must be one of .*ihdm-cifar.*, not nothing"):
        read_published(path, settings(preset="nothing"))
    with pytest.raises(ConfigError, match=r"resolution must be divisible by 2, for 2 stages, not 15"):
        read_published(path, settings(resolution=15))


def _without(*keys: Any) -> Callable[[dict[str, Any]], object]:
    def change(checkpoint: dict[str, Any]) -> None:
        inner: Any = checkpoint
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return change


def _swap(checkpoint: dict[str, Any]) -> None:
    listed = checkpoint["ema"]["shadow_params"]
    listed[0], listed[1] = listed[1], listed[0]


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a short list": (_without("ema", "shadow_params", -1), "must list 128 tensors beside its weights, not 127"),
    "another order": (_swap, "a list has no tensor of the shape of time_embed.0.weight"),
    "a part lacks": (_without("model", "module.middle_block.1.qkv.bias"), "lacks middle.0.attention.qkv.bias"),
    "no stem": (_without("model", "module.input_blocks.0.0.weight"), "lacks input_blocks.0.0.weight"),
    "strange": (
        lambda checkpoint: checkpoint["model"].update({"module.out.3.weight": torch.ones(1)}),
        "holds out.3.weight, which has no place in the network",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_file_that_is_not_whole(what: str, save: Save, settings: Callable[..., Path]) -> None:
    change, message = BROKEN[what]
    path = save(change)
    with pytest.raises(CheckpointError, match=message):
        read_published(path, settings())
    with pytest.raises(CheckpointError, match=message):
        read_training_state(path)


def test_a_run_cannot_go_on_without(save: Save) -> None:
    for change, message in (
        (_without("optimizer", "state", 5), "must hold Adam's state of 128 tensors"),
        (_without("optimizer", "state", 5, "exp_avg"), "lacks 5.exp_avg"),
        (_without("step"), "lacks step"),
        (lambda checkpoint: checkpoint.update(step=-1), "counters of steps must be whole numbers"),
        (_without("ema"), "lacks ema.shadow_params"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_training_state(save(change))


def test_images_give_an_imported_model_its_bank(save: Save, settings: Callable[..., Path], tmp_path: Path) -> None:
    """Of the training part alone; without it samples are refused by a line that says so."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    for index, image in enumerate(pixels):
        folder = tmp_path / "images" / ("train" if index else "test")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    bare = import_published(save(), "ihdm", tmp_path / "bare", settings())
    lacks = "a bank of starts and moments of waves are not in published files and are needed to draw samples"
    assert bare.notes[0].startswith(lacks)
    assert bare.notes[0].endswith("estimate them with --images")
    with pytest.raises(DataError, match=r"this model has none; give it one with 'hflow-rt import FILE --images"):
        session_of(load_model(tmp_path / "bare" / "model.safetensors")).sample(1)
    found = import_published(save(), "ihdm", tmp_path / "run", settings(), tmp_path / "images")
    assert found.learned is not None
    assert (found.learned["images"], found.learned["held_out"]) == (4, 1)
    model: Any = load_model(tmp_path / "run" / "model.safetensors")
    assert (model.config.bank, model.config.moments) == (4, True)
    training = torch.from_numpy(pixels[1:].transpose(0, 3, 1, 2).copy())
    starts, moments = known(model.config, [training])
    assert torch.equal(model.starts, starts)
    assert torch.equal(model.moments, moments)
    # numbers of each image: the waves that survive, of which these few cannot hold the image
    assert starts[0].numel() < 192 < training[0].numel()
    session = session_of(model)
    assert session.sample(2, steps=3).shape == (2, 3, 16, 16)
