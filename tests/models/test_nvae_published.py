"""Checkpoints as the published NVAE writes them: options tell the network, and misfits are named."""

import json
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.nvae.network import Network
from hflow_rt.models.nvae.published import read_published
from hflow_rt.models.nvae.published_settings import settings_of_options
from hflow_rt.models.nvae.weights import our_names

CASE = Path(__file__).parents[1] / "golden" / "nvae" / "a_cifar"
EXPANDED = "dec_tower.1._ops.0.conv.1.conv.0"

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(CASE.with_suffix(".weights.safetensors"))


@pytest.fixture
def save(weights: dict[str, torch.Tensor], tmp_path: Path) -> Save:
    """Writes a checkpoint with these options changed, or without those that are None."""

    def made(**changes: Any) -> Path:
        options = json.loads(CASE.with_suffix(".json").read_text())["original_args"] | changes
        options = {name: value for name, value in options.items() if value is not None}
        state = OrderedDict(weights)
        state[f"{EXPANDED}.weight_normalized"] = state[f"{EXPANDED}.weight"]
        moments = {0: {"step": 3, "exp_avg": torch.zeros(2), "exp_inf": torch.zeros(2)}}
        checkpoint = {
            "epoch": 3,
            "state_dict": state,
            "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            "global_step": 31,
            "args": Namespace(**options),
            "scheduler": {"T_max": 16.0},
            "grad_scalar": {"scale": 1024.0},
        }
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        return tmp_path / "checkpoint.pt"

    return made


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Path]:
    def made(**values: Any) -> Path:
        (tmp_path / "settings.json").write_text(json.dumps(values))
        return tmp_path / "settings.json"

    return made


def test_options_tell_the_network(save: Save, settings: Callable[..., Path], weights: dict[str, torch.Tensor]) -> None:
    # what older files lack takes its default, 10 logistics among them, which this network does not have
    found = read_published(save(ada_groups=None, min_groups_per_scale=None))
    assert (found.part, found.prefix, found.dropped) == ("state_dict", "", {"duplicate weight": 1})
    assert "non-commercial" in found.notes[0]
    config = found.config.model_dump()
    assert (config["groups"], config["mixtures"], config["flows"], config["bits"]) == ((3,), 2, 1, 8)
    assert config["likelihood"] == "exact"
    network = Network(found.config)  # type: ignore[arg-type]
    load_state(network, found.state, "the file")
    assert torch.equal(found.state["decoder.1.body.expand.weight"], weights[f"{EXPANDED}.weight"])
    assert found.state["before.0.body.0.norm.num_batches_tracked"] == 40
    overruled = read_published(save(), settings(likelihood="published"))
    assert overruled.config.model_dump() == config | {"likelihood": "published"}


def test_bare_weights_need_settings(
    settings: Callable[..., Path], weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    bare = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    save_file({f"module.{name}": tensor for name, tensor in bare.items()}, tmp_path / "bare.safetensors")
    path = tmp_path / "bare.safetensors"
    with pytest.raises(ConfigError, match=r"does not say how the network is built; .* --preset nvae-cifar"):
        read_published(path)
    with pytest.raises(CheckpointError, match=r"holds 378 tensors, too few for the 122 cells"):
        read_published(path, settings(preset="nvae-cifar"))
    with pytest.raises(ConfigError, match=r"preset must be one of .*nvae-cifar.*, not nothing"):
        read_published(path, settings(preset="nothing"))
    changes = {"groups": [3], "latent_channels": 4, "encoder_width": 8, "decoder_width": 8, "mixtures": 2}
    found = read_published(path, settings(preset="nvae-cifar", **changes))
    assert found.prefix == "module."
    load_state(Network(found.config), found.state, "the file")  # type: ignore[arg-type]
    assert found.state["before.0.body.0.norm.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch_instance": "res_elu"}, r"arch_instance must be res_mbconv, the only one that is known, not res_elu"),
        ({"num_groups_per_scale": 1}, r"one group and one scale, which has no towers"),
        ({"num_groups_per_scale": 256}, r"too few for the 1,026 cells that its settings ask for"),
        ({"num_postprocess_blocks": 2}, r"num_preprocess_blocks and num_postprocess_blocks differ: 1 and 2"),
        ({"dataset": "stacked_mnist"}, r"dataset must be one of the published ones, not stacked_mnist"),
        ({"use_se": None}, r"must tell the option use_se"),
        ({"num_latent_scales": "3"}, r"num_latent_scales must be a whole number from 1 to 10, not 3"),
        ({"num_nf": -1}, r"flows: .*greater than or equal to 0"),
    ],
)
def test_options_that_do_not_fit(save: Save, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        read_published(save(**changes))


def test_images_follow_from_the_dataset() -> None:
    options = json.loads(CASE.with_suffix(".json").read_text())["original_args"]

    def of(**changes: Any) -> dict[str, Any]:
        return settings_of_options(options | changes, "the file")

    assert [of(dataset=name)["resolution"] for name in ("celeba_64", "lsun_bedroom_128", "ffhq")] == [64, 128, 256]
    binary = of(dataset="omniglot")
    assert (binary["resolution"], binary["padding"], binary["output"]) == (28, 2, "bernoulli")
    assert of(num_mixture_dec=1)["output"] == "normal"
    many = of(num_latent_scales=3, num_groups_per_scale=16, ada_groups=True, min_groups_per_scale=5)
    assert many["groups"] == (16, 8, 5)
    assert of(weight_decay_norm_anneal=True)["weight_penalty_start"] == 10.0


def test_positions_of_cells_that_upsample_are_shifted() -> None:
    normal = our_names(["dec_tower.1._ops.0.conv.3.weight", "dec_tower.1._ops.0.conv.2.conv.1.running_var"])
    assert list(normal.values()) == ["decoder.1.body.project.weight", "decoder.1.body.norm_depthwise.running_var"]
    up = our_names(["post_process.0.skip.1.weight", "post_process.0._ops.0.conv.3.conv.0.weight"])
    assert list(up.values()) == ["after.0.skip.conv.weight", "after.0.body.depthwise.weight"]
