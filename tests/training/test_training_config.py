import json
from pathlib import Path

import pytest

from hflow_rt.errors import ConfigError
from hflow_rt.models.checkpoint import skeleton
from hflow_rt.models.registry import FAMILIES, family
from hflow_rt.training.config import load_config, preset_names
from hflow_rt.training.optimizers import trained_groups


def test_every_preset_is_valid_and_survives_json() -> None:
    assert "hflow-demo" in preset_names()
    assert "toy" in preset_names()
    for name in preset_names():
        settings = load_config(name)
        again = load_config(file=json.loads(json.dumps(settings.dump())))
        assert again == settings
        # the models of a family have the same groups at any size
        plan = skeleton(settings.family, family(settings.family).tiny["model"]).plan(settings.training)
        assert trained_groups(settings, plan).keys() == {phase.optimizer for phase in plan.phases()}


def test_file_changes_a_preset_and_set_changes_both(tmp_path: Path) -> None:
    toml = tmp_path / "settings.toml"
    toml.write_text('preset = "toy"\n[training]\nbatch_size = 7\n[training.learning_rates]\nflows = 0.5\n')
    settings = load_config(file=toml, overrides=["training.seed=3", "model.hidden=9"])
    assert settings.preset == "toy"
    assert settings.training.batch_size == 7
    assert settings.training.learning_rates == {"encoders": 1e-3, "decoders": 2e-3, "flows": 0.5}
    assert settings.training.seed == 3
    assert settings.model.model_dump()["hidden"] == 9


def test_overrides_reach_into_lists_and_new_group_entries() -> None:
    settings = load_config("hflow-demo", overrides=["model.levels.0.steps=2", "training.cut_images.encoders=5"])
    assert settings.model.model_dump()["levels"][0]["steps"] == 2
    assert settings.training.cut_images == {"encoders": 5}
    assert load_config("toy", overrides=["training.precision=bf16"]).training.precision == "bf16"


def test_a_complete_file_takes_nothing_from_its_preset() -> None:
    values = load_config("toy").dump()
    values["training"]["decay_factors"] = {}
    assert load_config(file=values).training.decay_factors == {}


def test_settings_of_an_optimizer() -> None:
    config = load_config("toy", overrides=["training.eps=1e-3", "training.optimizers.one.weight_decay=0.5"]).training
    common = {"kind": "adam", "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0}
    assert config.optimizer_settings("other").model_dump() == common
    assert config.optimizer_settings("one").model_dump() == common | {"weight_decay": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batchsize=3", r"unknown setting training.batchsize; did you mean training.batch_size"),
        ("model.hiden=3", r"unknown setting model.hiden; did you mean model.hidden"),
        ("batch_size=3", r"unknown setting batch_size in --set; did you mean training.batch_size"),
        ("training.batch_size.x=3", r"training.batch_size is a single value and has no 'x'"),
        ("training.batch_size=0", r"training.batch_size: .*greater than 0; found 0"),
        ("training.grad_clip=-1", r"training.grad_clip: .*; found -1"),
        ("training.learning_rates.flows=NaN", r"training.learning_rates.flows: "),
        ("training.precision=fp8", r"training.precision: .*; found \"fp8\""),
        ("training.optimizers.x.kind=sgd", r"training.optimizers.x.kind: .*; found \"sgd\""),
        ("training.ema_ramp=0.05", r"training: ema_ramp shortens a half-life; give ema_half_life_images too"),
        ("training.batch_size", r"--set takes a.b=value"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config("toy", overrides=[override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["hflow-demo", "glow-demo"])
def test_a_family_of_colours_refuses_grey(preset: str) -> None:
    assert load_config(preset).channels == 3
    with pytest.raises(ConfigError, match=r"^model\.channels: Input should be 3; found 1$"):
        load_config(preset, overrides=["model.channels=1"])


def test_list_index_out_of_range_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model.levels has entries 0 to 2; found '7'"):
        load_config("hflow-demo", overrides=["model.levels.7.steps=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "neither whole JSON nor TOML"),
        ("[1]", "must hold an object"),
        ('{"model": {}}', "must name a 'preset' or a 'family'"),
        ('{"preset": "tiy"}', "unknown preset 'tiy'; did you mean toy"),
        ('{"family": "nothing"}', "unknown model family 'nothing'"),
        ('{"preset": "toy", "trainng": {}}', "unknown setting trainng in .*; did you mean training"),
        ('{"family": "toy", "training": {}}', "training.learning_rates: Field required"),
        ('{"preset": "toy", "training": {"learning_rates": 3}}', "learning_rates must be an object"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file=file)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_foreign_preset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        load_config(file=tmp_path / "none.json")
    with pytest.raises(ConfigError, match="preset 'toy' belongs to family 'toy'"):
        load_config("toy", {"family": "hflow"})


def test_presets_are_never_changed() -> None:
    before = {name: repr(family(name).presets) for name in FAMILIES}
    load_config("hflow-demo", overrides=["model.levels.0.steps=2", "training.learning_rates.flows=1"])
    assert {name: repr(family(name).presets) for name in FAMILIES} == before
