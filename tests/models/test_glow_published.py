"""Published Glow weights: settings read off shapes, both layouts, Lightning's wrapping, and files that do not fit."""

import collections
import json
import sys
import types
from argparse import Namespace
from collections import Counter
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


Wrap = Callable[[dict[str, Tensor]], Any]


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() if name.endswith(("w_p", "s_sign")) else value + 1 for name, value in state.items()}


def before(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


OPTIMIZER = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
AN_OPTIMIZER = "an optimizer's state"
# what wraps the weights, the part and prefix they are taken from, and what is passed over
BELOW: dict[str, tuple[Wrap, str, str, dict[str, str]]] = {
    "the case": (
        lambda state: {"model": state, "optimizer": OPTIMIZER, "iteration": 5},
        "model", "", {"optimizer": AN_OPTIMIZER, "iteration": "a number"},
    ),
    "any name": (lambda state: {"my-flow 2": state}, "my-flow 2", "", {}),
    "depth two": (
        lambda state: {"checkpoint": {"net": state, "epoch": 3}, "optimizer": OPTIMIZER, "args": Namespace(lr=1.0)},
        "checkpoint.net", "",
        {"optimizer": AN_OPTIMIZER, "args": "a record of argparse.Namespace", "checkpoint.epoch": "a number"},
    ),
    "counters beside tensors": (
        lambda state: {"step": 5, "version": "1.0", "best": None, "rate": 0.5, **state},
        ".", "", {"step": "a number", "version": "text", "best": "nothing", "rate": "a number"},
    ),
    "DataParallel": (lambda state: before("module.", state), ".", "module.", {}),
    "compiled": (lambda state: {"model": before("module._orig_mod.", state)}, "model", "module._orig_mod.", {}),
    "a network beside": (
        lambda state: before("flow.net.", state) | {"loss.vgg.w": torch.ones(1), "loss.b": torch.ones(1)},
        ".", "flow.net.", {"loss": "2 tensors"},
    ),
    "a discriminator": (
        lambda state: {"g": state, "d": {"conv.weight": torch.ones(1)}, "g_optim": OPTIMIZER, "d_optim": OPTIMIZER},
        "g", "", {"d": "1 tensor", "g_optim": AN_OPTIMIZER, "d_optim": AN_OPTIMIZER},
    ),
    "an average in a list": (
        lambda state: {"model": state, "ema": {"decay": 0.9, "shadow_params": list(state.values())[:3]}},
        "model", "", {"ema": "shadow_params: a list of 3 tensors"},
    ),
    "an average of torch": (
        lambda state: {"n_averaged": torch.tensor(3), **before("module.", state)},
        ".", "module.", {"n_averaged": "1 tensor"},
    ),
    "the same twice": (lambda state: {"model": state, "state_dict": state}, "model", "", {"state_dict": "the same"}),
    "a schedule": (
        lambda state: {"net": state, "lr_scheduler": {"milestones": Counter([5, 9]), "on": torch.device("cuda:0")}},
        "net", "", {"lr_scheduler": "a dictionary"},
    ),
    "a list of weights beside": (
        lambda state: {"net": state, "all": [state, 5]}, "net", "", {"all": "a list of 2 (144 tensors, a number)"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BELOW))
def test_weights_below_another_key(what: str, saved: Callable[..., Saved], settings: Path) -> None:
    wrap, part, prefix, passed_over = BELOW[what]
    plain, _ = saved("plain.pt")
    path, _ = saved(wrap=wrap)
    found, expected = read_published(path, settings), read_published(plain, settings)
    assert (found.part, found.prefix, found.passed_over) == (part, prefix, passed_over)
    assert (expected.part, expected.prefix, expected.passed_over) == (".", "", {})
    assert (found.config, found.dropped) == (expected.config, expected.dropped)
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)


# what wraps the weights; names of the raw and of the averaged ones, as the message lists them
TWO: dict[str, tuple[Wrap, str, str]] = {
    "state_dict": (lambda s: {"state_dict": s, "ema_state_dict": averaged(s)}, "state_dict", "ema_state_dict"),
    "model": (lambda s: {"model": s, "model_ema": before("module.", averaged(s))}, "model", "model_ema"),
    "g": (lambda s: {"g": before("module.", s), "g_ema": averaged(s), "g_optim": OPTIMIZER}, "g", "g_ema"),
    "in one": (lambda s: {"model": {"raw": s, "ema": averaged(s)}, "step": 1}, "model.raw", "model.ema"),
    "prefixes": (lambda s: before("model.", s) | before("model_ema.", averaged(s)), "model", "model_ema"),
    "a prefix of both": (lambda s: before("net.", s) | before("net.ema.", averaged(s)), "net", "net.ema"),
    "one without": (lambda s: s | before("ema.", averaged(s)), ".", "ema"),
    "Lightning": (lambda s: {"state": before("n.", s) | before("e.", averaged(s))}, "state.n", "state.e"),
}  # fmt: skip


FLAT = ("prefixes", "a prefix of both", "one without")


@pytest.mark.parametrize(("what", "suffix"), [(what, "pt") for what in TWO] + [(what, "safetensors") for what in FLAT])
def test_averaged_weights_are_never_passed_over_without_a_word(
    what: str, suffix: str, saved: Callable[..., Saved], settings: Path
) -> None:
    wrap, raw, ema = TWO[what]
    path, state = saved(f"glow.{suffix}", wrap=wrap)
    with pytest.raises(CheckpointError) as caught:
        read_published(path, settings)
    assert str(caught.value) == f"{path} holds 2 networks ({raw}, {ema}); choose one with --part NAME"
    for part, weights, other in ((raw, state, ema), (ema, averaged(state), raw)):
        found = read_published(path, settings, part)
        expected = from_original(found.config, weights)  # type: ignore[arg-type]
        assert found.state.keys() == expected.keys()
        assert all(torch.equal(found.state[name], value) for name, value in expected.items())
        assert found.part == part
        assert found.passed_over[other] == f"{len(state)} tensors"
    with pytest.raises(CheckpointError, match=rf"has no weights called other; --part must be one of {raw}, {ema}$"):
        read_published(path, settings, "other")


HOLDS: dict[str, tuple[Any, str]] = {
    "an optimizer": (OPTIMIZER, "holds an optimizer's state; give"),
    "an optimizer below a key": (
        {"optimizer": OPTIMIZER, "epoch": 3}, "holds optimizer (an optimizer's state), epoch (a number); give"
    ),
    "a tensor": (torch.ones(3), "holds a single tensor; give"),
    "a list": ([torch.ones(3), torch.ones(2)], "holds a list of 2 tensors; give"),
    "a list of weights": (({"w": torch.ones(3)}, 5), "holds a list of 2 (1 tensor, a number); give"),
    "nothing": ({}, "holds an empty dictionary; give"),
    "averages in a list": (
        {"ema": {"shadow_params": [torch.ones(3)] * 2}}, "holds ema (shadow_params: a list of 2 tensors); give"
    ),
    "numbers by name": ({0: torch.ones(3)}, "must name its tensors blocks.0.flows.0... or flow.layers.1"),
    "another network": (
        {"model": {"conv.weight": torch.ones(3)}},
        "must name its tensors blocks.0.flows.0... or flow.layers.1..., as published Glow models do; found model.conv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(HOLDS))
def test_a_whole_file_without_weights_is_not_called_damaged(what: str, tmp_path: Path) -> None:
    value, message = HOLDS[what]
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        read_published(tmp_path / "x.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'x.pt'} {message}")
    assert "\n" not in str(caught.value)
    assert "download" not in str(caught.value)


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
        r"holds 2 networks \(\., other\); choose one with --part NAME",
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
