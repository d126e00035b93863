"""Starting from another model's weights, freezing parameters, and training only the coarse levels."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hflow_rt.cli.__main__ import app
from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.models.checkpoint import build_model, load_model, read_metadata
from hflow_rt.models.hflow.bound import finest_trained
from hflow_rt.training.config import RunConfig, load_config
from hflow_rt.training.trainer import train

RATES = {"encoders": 5e-4, "decoders": 2e-3, "flows": 5e-3}


class Pictures:
    """Random pixels with a fixed split."""

    def __init__(self) -> None:
        self.names = [f"{index:02d}" for index in range(24)]
        self.hash = "pictures"

    def __len__(self) -> int:
        return 24

    def pixels(self, indices: Any) -> Any:
        return np.random.default_rng(0).integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)[np.asarray(indices)]

    def split(self) -> Any:
        return np.arange(20), np.arange(20, 24)


def settings(model: dict[str, Any], **training: Any) -> RunConfig:
    fixed = {"batch_size": 4, "accumulate": 1, "learning_rates": RATES, "ema_weight": 1.0, "init_images": 8}
    return load_config(file={"family": "hflow", "model": model, "training": fixed | training})


def coarse_only(model: dict[str, Any]) -> dict[str, Any]:
    changed = deepcopy(model)
    changed["levels"][0]["loss_weight"] = 0
    return changed


def test_starts_with_the_weights_of_the_other(tiny_settings: Any, tiny_run: Path, tmp_path: Path) -> None:
    """With every rate at zero the result is the model it started from, spreads aside."""
    config = settings(tiny_settings, learning_rates=dict.fromkeys(RATES, 0.0))
    source = tiny_run / "model.safetensors"
    result = train(config, Pictures(), tmp_path / "run", images=8, device="cpu", weights=source)
    before, after = load_file(source), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if "spread" not in name)
    assert result.initial is not None
    about = json.loads((tmp_path / "run" / "run.json").read_bytes())["run"]["from"]
    assert about["name"] == str(source)
    assert read_metadata(tmp_path / "run" / "model.safetensors")["from"] == about
    # and goes on by itself
    train(config, Pictures(), tmp_path / "run", images=16, device="cpu", resume=True)
    assert json.loads((tmp_path / "run" / "run.json").read_bytes())["run"]["from"] == about


def test_does_not_fit(tiny_settings: Any, tiny_run: Path, tmp_path: Path) -> None:
    other = deepcopy(tiny_settings)
    other["levels"][0]["coupling_channels"] = 10
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train(
            settings(other), Pictures(), tmp_path / "r", images=4, device="cpu", weights=tiny_run / "model.safetensors"
        )
    toy = load_config("toy")
    with pytest.raises(CheckpointError, match="holds a model of family 'hflow', not 'toy'"):
        train(toy, _Small(), tmp_path / "r", images=4, device="cpu", weights=tiny_run / "model.safetensors")
    assert not (tmp_path / "r").exists()


class _Small(Pictures):
    def pixels(self, indices: Any) -> Any:
        return super().pixels(indices)[:, :, :8, :8]


def test_frozen_parameters_stay(tiny_settings: Any, tiny_run: Path, tmp_path: Path) -> None:
    config = settings(tiny_settings, frozen=["*encoder.*", "levels.1.flow.*"])
    source = tiny_run / "model.safetensors"
    train(config, Pictures(), tmp_path / "run", images=8, device="cpu", weights=source)
    before, after = load_file(source), load_file(tmp_path / "run" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name]) and "spread" not in name}
    assert moved
    assert not [name for name in moved if "encoder." in name or name.startswith("levels.1.flow.")]
    assert any(name.startswith("levels.0.flow.") for name in moved)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (["levels.9.*"], "training.frozen: 'levels.9.*' fits no parameter, such as 'levels.0."),
        (["*"], "training.frozen leaves nothing to train; freeze less"),
    ],
)
def test_frozen_mistakes(tiny_settings: Any, tmp_path: Path, frozen: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(settings(tiny_settings, frozen=frozen), Pictures(), tmp_path / "run", images=4, device="cpu")
    assert str(caught.value).startswith(message)


def test_a_level_without_weight_is_not_run(tiny_settings: Any, tiny_run: Path) -> None:
    """In training its nets see nothing and get no gradient; the coarse terms are what they were."""
    whole, part = build_model("hflow", tiny_settings), build_model("hflow", coarse_only(tiny_settings))
    state = load_file(tiny_run / "model.safetensors")
    for model in (whole, part):
        model.load_state_dict(state)
        model.train()
    x = torch.rand(4, 3, 16, 16) - 0.5
    noise = {name: torch.randn(4, *shape) for name, shape in whole.noise_shapes().items()}
    expected, found = whole.loss(x, noise), part.loss(x, noise)
    assert list(found.terms) == ["end0", "end1", "z1"]
    assert all(torch.equal(found.terms[name], expected.terms[name]) for name in found.terms)
    assert found.bits_per_dim is None
    assert expected.bits_per_dim is not None
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert all(
        p.grad is None for n, p in part.named_parameters() if n.startswith(("levels.0.flow", "levels.0.decoder"))
    )
    assert any(p.grad is not None for n, p in part.named_parameters() if n.startswith("levels.1.flow"))
    # everything else does not know of weights
    whole.eval(), part.eval()
    assert torch.equal(part.loss(x, noise).bits_per_dim, whole.loss(x, noise).bits_per_dim)  # type: ignore[arg-type]
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    inputs = [m.bound_inputs("strict", pixels, torch.Generator().manual_seed(1)) for m in (whole, part)]  # type: ignore[operator]
    terms = [m.bound_terms(drawn) for m, drawn in zip((whole, part), inputs, strict=True)]  # type: ignore[operator]
    assert all(torch.equal(value, terms[1][name]) for name, value in terms[0].items())


def test_only_the_end_vector(tiny_settings: Any) -> None:
    none = coarse_only(tiny_settings)
    none["levels"][1]["loss_weight"] = 0
    model = build_model("hflow", none)
    assert finest_trained(model) == 2  # type: ignore[arg-type]
    assert list(model.train().loss(torch.rand(4, 3, 16, 16) - 0.5).terms) == ["end0", "end1"]


def test_a_coarse_run(tiny_settings: Any, tiny_run: Path, tmp_path: Path) -> None:
    """The whole path: the trainer copes with losses that have no bound, and the fine levels come out as they were."""
    frozen = ["*encoder.*", "*decoder.*", "end_output.*", "levels.*.skip.*"]
    config = settings(coarse_only(tiny_settings), frozen=frozen)
    source = tiny_run / "model.safetensors"
    result = train(config, Pictures(), tmp_path / "run", images=12, device="cpu", weights=source)
    assert result.final is not None
    assert "strict" in result.final.figures
    before, after = load_file(source), load_file(tmp_path / "run" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in moved if "spread" not in name} == {"end_flow", "levels"}
    levels = {name for name in moved if name.startswith("levels")}
    assert levels
    assert all(name.startswith(("levels.1.flow.", "levels.1.condition.")) for name in levels)
    assert load_model(tmp_path / "run" / "model.safetensors").config.levels[0].loss_weight == 0  # type: ignore[attr-defined]


def test_command(tiny_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--from", str(tiny_run), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert str(result.exception) == (
        f"{tiny_run} holds no settings of a training run; name some with --preset or --config"
    )
    result = CliRunner().invoke(app, ["train", "--from", str(tiny_run), "--resume"])
    assert "--resume takes weights and settings from the run" in str(result.exception)
