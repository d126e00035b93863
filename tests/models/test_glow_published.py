"""Published Glow weights: settings read off shapes, both layouts, Lightning's wrapping, and files that do not fit."""

import collections
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.foreign.importing import import_published
from hflow_rt.models.checkpoint import load_model
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.network import Glow
from hflow_rt.models.glow.published import read_published
from hflow_rt.models.glow.weights import from_original

Saved = tuple[Path, dict[str, Tensor]]


def blocks_state(levels: int = 2, steps: int = 3, hidden: int = 5) -> dict[str, Tensor]:
    """Random weights in the layout of spec 11's first column, unused tensors included."""
    state: dict[str, Tensor] = {}
    for level in range(levels):
        c = 12 * 2**level
        for step in range(steps):
            head = f"blocks.{level}.flows.{step}."
            state |= {f"{head}actnorm.{leaf}": 0.1 * torch.randn(1, c, 1, 1) for leaf in ("bias", "logs")}
            mixing = f"{head}invconv."
            state |= {mixing + leaf: 0.1 * torch.randn(c, c) for leaf in ("w_l", "w_u")}
            state |= {mixing + "w_s": 0.1 * torch.randn(c), mixing + "w_p": torch.eye(c)[torch.randperm(c)]}
            state |= {mixing + "s_sign": torch.randn(c).sign()}
            state |= {mixing + leaf: torch.ones(c, c) for leaf in ("u_mask", "l_mask", "l_eye")}
            for net in range(2):
                part = f"{head}coupling.nets.{net}."
                state |= {part + "0.weight": 0.1 * torch.randn(hidden, c // 2, 3, 3)}
                state |= {part + "2.weight": 0.1 * torch.randn(hidden, hidden, 1, 1)}
                state |= {f"{part}{place}.bias": 0.1 * torch.randn(hidden) for place in (0, 2)}
                state |= {part + "4.conv.weight": 0.1 * torch.randn(c, hidden, 3, 3)}
                state |= {part + "4.conv.bias": 0.1 * torch.randn(c), part + "4.scale": 0.1 * torch.randn(1, c, 1, 1)}
    return state


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Saved]:
    def save(name: str = "glow.pt", wrap: Callable[[dict[str, Tensor]], Any] = lambda state: state) -> Saved:
        torch.manual_seed(0)
        state = blocks_state()
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(wrap(state), path)
        else:
            torch.save(wrap(state), path)
        return path, state

    return save


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"resolution": 16, "bits": 5}))
    return path


def test_settings_are_read_off_the_weights(saved: Callable[..., Saved], settings: Path) -> None:
    path, _ = saved()
    found = read_published(path, settings)
    assert found.config == GlowConfig(
        resolution=16, levels=2, steps=3, hidden_channels=5, scale="exp_sigmoid", moving="first", hidden="bias",
        edge="ones", lu=True, split_prior=False, top_prior="fixed", bits=5,
    )  # fmt: skip
    assert found.dropped == {"mask": 18, "tensor of subnets never used": 42}
    assert found.notes == ()


def test_a_file_without_the_side_of_its_images_says_what_to_give(saved: Callable[..., Saved], tmp_path: Path) -> None:
    path, _ = saved()
    with pytest.raises(ConfigError, match=r'such as \{"resolution": 64\}, with --settings'):
        read_published(path)
    (tmp_path / "side.json").write_text('{"resolution": 16}')
    assert "8 were taken" in read_published(path, tmp_path / "side.json").notes[0]


class Hyper(dict):  # type: ignore[type-arg]
    """Stands for the dictionary class that Lightning keeps hyperparameters in."""


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Tensor]], Any]:
    """Wrap a state as Lightning does, with a class of its own among the hyperparameters."""
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.utilities.parsing"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Hyper, "__module__", module.__name__)
    module.Hyper = Hyper  # type: ignore[attr-defined]

    def wrap(state: dict[str, Tensor]) -> Any:
        return {
            "epoch": 3,
            "pytorch-lightning_version": "1.6.0",
            "state_dict": collections.OrderedDict((f"flow_net.{name}", value) for name, value in state.items()),
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.5), "best_model_path": "x.ckpt"}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
            "hyper_parameters": Hyper(n_bits=5),
        }

    return wrap


@pytest.mark.parametrize("kind", ["bare", "prefixed", "safetensors", "lightning"])
def test_every_container_gives_the_same_run(
    kind: str,
    saved: Callable[..., Saved],
    settings: Path,
    lightning: Callable[[dict[str, Tensor]], Any],
    tmp_path: Path,
) -> None:
    wrap = {
        "prefixed": lambda state: {f"model.net.{k}": v for k, v in state.items()},
        "lightning": lightning,
    }.get(kind, lambda state: state)
    path, state = saved("glow.safetensors" if kind == "safetensors" else "glow.ckpt", wrap)
    report = import_published(path, "glow", tmp_path / "run", settings)
    assert report.resolution == 16
    model = load_model(tmp_path / "run" / "model.safetensors")
    assert isinstance(model, Glow)
    assert model.initialized
    expected = from_original(model.config, state)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name].to(value.dtype)) for name, value in model.state_dict().items())
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert (model.double().decode(model.encode(x.double()).latents) - x).abs().max() < 1e-9


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


FLOW = "blocks.1.flows.2."
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no network": (lambda state: {"encoder.weight": torch.zeros(2)}, "as published Glow models do"),
    "a tensor missing": (without(f"{FLOW}invconv.w_s"), "missing levels.1.chain.steps.2.mixing.log_diagonal"),
    "no first subnet": (without("blocks.0.flows.0.coupling.nets.0.0.weight"), "lacks the subnet of its first step"),
    "a wrong shape": (lambda state: state | {f"{FLOW}actnorm.bias": torch.zeros(1, 3, 1, 1)}, "is \\[3\\] in the file"),
    "no permutation": (lambda state: state | {f"{FLOW}invconv.w_p": torch.ones(24, 24)}, "must be a permutation"),
    "NaN": (lambda state: state | {f"{FLOW}actnorm.bias": torch.full((1, 24, 1, 1), torch.nan)}, "NaN or infinite"),
    "two networks": (
        lambda state: state | {f"other.{name}": value for name, value in state.items()},
        "more than one network",
    ),
    "a stranger": (lambda state: state | {"blocks.0.extra": torch.zeros(1)}, "unexpected blocks.0.extra"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_does_not_fit_is_named(what: str, saved: Callable[..., Saved], settings: Path, tmp_path: Path) -> None:
    wrap, message = BROKEN[what]
    path, _ = saved(wrap=wrap)
    with pytest.raises(CheckpointError, match=message):
        import_published(path, "glow", tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_settings_cannot_ask_for_more_steps_than_there_are(saved: Callable[..., Saved], tmp_path: Path) -> None:
    path, _ = saved()
    (tmp_path / "many.json").write_text('{"resolution": 16, "steps": 4000}')
    with pytest.raises(CheckpointError, match="which 8,000 flow steps cannot have"):
        read_published(path, tmp_path / "many.json")
