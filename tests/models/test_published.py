"""Published hflow checkpoints: the container, state dicts with settings, spreads, and weights that do not fit."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hflow_rt.errors import CheckpointError, ConfigError, DataError
from hflow_rt.foreign.importing import import_published
from hflow_rt.models.checkpoint import load_model, read_metadata
from hflow_rt.models.hflow.published import read_published
from hflow_rt.models.registry import FAMILIES, Published

GOLDEN = Path(__file__).parents[1] / "golden" / "hflow"
ATTACKS = Path(__file__).parents[1] / "attacks"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tiny32.weights.safetensors")


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    return json.loads((GOLDEN / "tiny32.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a container of weights as the published implementation does."""
    monkeypatch.syspath_prepend(ATTACKS)

    def call(state: dict[str, torch.Tensor], settings: dict[str, Any] | None) -> Path:
        from generators import published

        path = tmp_path / "model_iter_9.bin"
        path.write_bytes(published({name: value.numpy() for name, value in state.items()}, settings))
        return path

    return call


@pytest.fixture
def settings_file(tmp_path: Path, description: dict[str, Any]) -> Path:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(description["config"]))
    return path


def same(found: Published, expected: Published) -> None:
    assert found.config == expected.config
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)
    assert found.dropped == expected.dropped


def test_a_container_equals_its_weights(
    write: Callable[..., Path], weights: dict[str, torch.Tensor], description: dict[str, Any], settings_file: Path
) -> None:
    expected = read_published(GOLDEN / "tiny32.weights.safetensors", settings_file)
    before = set(sys.modules)
    same(read_published(write(weights, description["config"])), expected)
    assert "hflow" not in set(sys.modules) - before
    assert not Path("tmp_hflow_network_code.py").exists()
    assert expected.dropped == {"blur kernel": 8, "mask": description["weights"]["tensors"] - 8 - len(
        [name for name in expected.state if not name.startswith("spread_")]
    )}  # fmt: skip


def test_settings_may_be_missing_and_given(
    write: Callable[..., Path], weights: dict[str, torch.Tensor], settings_file: Path
) -> None:
    path = write(weights, None)
    with pytest.raises(ConfigError, match=r"holds no settings; give the original's JSON with --settings FILE"):
        read_published(path)
    same(read_published(path, settings_file), read_published(GOLDEN / "tiny32.weights.safetensors", settings_file))


def test_the_published_file(tmp_path: Path) -> None:
    """`tiny64.bin` is too large for the repository; it is read where the golden folder that has it is known."""
    roots = [Path(__file__).parents[3] / "shared" / "golden", Path(os.environ.get("HFLOW_RT_GOLDEN", GOLDEN))]
    found = [folder for root in roots for folder in (root / "hflow", root) if (folder / "tiny64.bin").is_file()]
    if not found:
        pytest.skip("no golden folder with tiny64.bin; name one with HFLOW_RT_GOLDEN")
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(json.loads((found[0] / "tiny64.json").read_text())["config"]))
    expected = read_published(found[0] / "tiny64.weights.safetensors", settings)
    same(read_published(found[0] / "tiny64.bin"), expected)
    assert expected.dropped == {"blur kernel": 8, "mask": 48}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_state_dicts(tmp_path: Path, weights: dict[str, torch.Tensor], settings_file: Path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    same(read_published(path, settings_file), read_published(GOLDEN / "tiny32.weights.safetensors", settings_file))


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "generator.flow."])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "below a key"])
def test_weights_below_another_key_and_behind_a_prefix(
    tmp_path: Path, weights: dict[str, torch.Tensor], settings_file: Path, prefix: str, kind: str
) -> None:
    named = {prefix + name: value for name, value in weights.items()}
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_file(named, path)
    else:
        torch.save({"ema": named, "step": 5} if kind == "below a key" else named, path)
    found = read_published(path, settings_file)
    same(found, read_published(GOLDEN / "tiny32.weights.safetensors", settings_file))
    assert found.prefix == prefix
    assert (found.part, found.passed_over) == (("ema", {"step": "a number"}) if kind == "below a key" else (".", {}))


def test_raw_and_averaged_weights(tmp_path: Path, weights: dict[str, torch.Tensor], settings_file: Path) -> None:
    path = tmp_path / "x.safetensors"
    other = {f"model_ema.{name}": value + 1 for name, value in weights.items()}
    save_file({f"model.{name}": value for name, value in weights.items()} | other, path)
    with pytest.raises(CheckpointError, match=r"x.safetensors holds 2 networks \(model, model_ema\); choose one with"):
        read_published(path, settings_file)
    found = read_published(path, settings_file, "model")
    same(found, read_published(GOLDEN / "tiny32.weights.safetensors", settings_file))
    assert found.passed_over == {"model_ema": f"{len(weights)} tensors"}


def test_another_network_is_named(tmp_path: Path, settings_file: Path) -> None:
    torch.save({"model": {"conv.weight": torch.ones(3)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"as published hflow models do; found model\.conv\.weight$"):
        read_published(tmp_path / "x.pt", settings_file)


def test_a_container_has_one_part(
    write: Callable[..., Path], weights: dict[str, torch.Tensor], description: dict[str, Any]
) -> None:
    path = write(weights, description["config"])
    assert read_published(path, part=".").part == "."
    with pytest.raises(CheckpointError, match=r"has no weights called ema; --part must be one of \.$"):
        read_published(path, part="ema")


def test_an_imported_run_computes_the_golden_images(
    tmp_path: Path, write: Callable[..., Path], weights: dict[str, torch.Tensor], description: dict[str, Any]
) -> None:
    path = write(weights, description["config"])
    done = import_published(path, "hflow", tmp_path / "run")
    assert (done.parameters, done.values) == tuple(description["weights"][k] for k in ("trainable", "trainable_values"))
    model: Any = load_model(tmp_path / "run" / "model.safetensors")
    stored = load_file(GOLDEN / "tiny32.io.safetensors")
    ends = stored["sample.end"].split(list(model.config.end.channels), 1)
    latents = {f"end{i}": part for i, part in enumerate(ends)} | {
        f"z{i}": stored[f"sample.z{i}"] for i in range(len(model.config.levels))
    }
    with torch.no_grad():
        image = model.generate(latents).image
    entry = next(entry for entry in description["tensors"] if entry["name"] == "sample.image")
    bound = 4 * entry["float32_max_abs_error"] + 1e-6 * entry["max_abs"] + 1e-7
    assert (image - stored["sample.image"]).abs().max().item() <= bound
    about = read_metadata(tmp_path / "run" / "model.safetensors")
    assert about["imported_from"] == {
        "file": "model_iter_9.bin", "sha256": done.sha256, "bytes": path.stat().st_size
    }  # fmt: skip
    assert about["learned"] is None
    assert "stay at 1" in about["notes"][0]
    assert {name: scale.spread for name, scale in model.noise_scales().items()} == dict.fromkeys(model.noised(), 1.0)


def test_a_run_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="run exists already"):
        import_published(GOLDEN / "tiny32.weights.safetensors", "hflow", tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_family_without_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses
    import types

    from hflow_rt.models.hflow import FAMILY

    mute = types.SimpleNamespace(FAMILY=dataclasses.replace(FAMILY, read_published=None))
    monkeypatch.setitem(sys.modules, "mute_family", mute)  # type: ignore[misc]
    monkeypatch.setitem(FAMILIES, "mute", "mute_family")
    with pytest.raises(ConfigError, match=r"the mute family reads no published checkpoints; these do: .*hflow"):
        import_published(GOLDEN / "tiny32.weights.safetensors", "mute", tmp_path / "run")


def test_everything_that_does_not_fit_is_listed(
    tmp_path: Path, weights: dict[str, torch.Tensor], settings_file: Path
) -> None:
    changed = dict(weights)
    del changed["endblock_split_conv.b"]
    changed["surprise"] = torch.zeros(2)
    changed["endblock_split_conv.w"] = torch.zeros(2, 3)
    changed["global_state.fc1.b"] = torch.full_like(weights["global_state.fc1.b"], torch.nan)
    changed["global_state.fc1.w"] = weights["global_state.fc1.w"].long()
    changed["blocks.0.skip_of_nothing.w"] = torch.full((1,), 1e300, dtype=torch.float64)
    save_file(changed, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        import_published(tmp_path / "x.safetensors", "hflow", tmp_path / "run", settings_file)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'x.safetensors'} does not fit the model: missing end_output.base.bias [")
    assert "end_output.base.weight is [2, 3] in the file and [" in message
    assert "end_output.mapping.0.bias holds NaN or infinite values" in message
    assert "unexpected" in message
    assert "and 2 more (1 missing, 2 of another shape or kind, 1 not finite, 2 unexpected in all)" in message
    assert not (tmp_path / "run").exists()


def test_a_double_that_is_infinite_as_a_float(
    tmp_path: Path, weights: dict[str, torch.Tensor], settings_file: Path
) -> None:
    bias = torch.full_like(weights["global_state.fc1.b"], 1e300, dtype=torch.float64)
    save_file(weights | {"global_state.fc1.b": bias}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"end_output.mapping.0.bias holds NaN or infinite values$"):
        import_published(tmp_path / "x.safetensors", "hflow", tmp_path / "run", settings_file)


def set_level(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(parameters: dict[str, Any]) -> None:
        parameters[key][1] = value

    return change


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parameters: parameters.update({key: value})


def set_end(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda parameters: parameters["ENDBLOCK_SETTINGS"].update({key: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_level("NUM_LAYERS", 4_000), r"flow steps of the settings cannot have"),
        (set_level("NUM_LAYERS", 60_000), "levels.1.steps: .*less than or equal to 4096"),
        (set_level("NUM_LAYERS", "400000000"), "levels.1.steps must be a number, not the text '400000000'"),
        (set_end("LAYERS", [4_000, 4_000, 4_000]), r"flow steps of the settings cannot have"),
        (set_end("LAYERS", [2, 60_000, 2]), "end.steps.1: .*less than or equal to 4096"),
        (set_end("LAYERS", ["2", "3", "2"]), "end.steps.0 must be a number, not the text '2'"),
        (set_end("BLOCK_Y0", "true"), "end.constant_start must be a number"),
        (set_key("GLOBAL_NET_CHANNELS", "20"), "style_channels must be a number"),
        (set_key("num_layers", [400_000_000] * 3), "hold NUM_LAYERS in two spellings; keep one"),
        (set_end("Layers", [400_000_000] * 3), "hold LAYERS in two spellings; keep one"),
        (set_level("CHANNELS", 65_536), "does not fit the model|too large"),
        (set_level("ENCODER_CHANNELS", 65_536), "does not fit the model"),
        (set_level("RNVP_CHANNELS", 65_532), "does not fit the model"),
        (set_level("DECODER_CHANNELS", 1 << 20), "must be within 65,536"),
        (set_level("RESOLUTIONS", 65_536), "must differ by 2 or 4"),
        (set_level("UNET_C_MULT", 65_536.0), "does not fit the model|no model can be built"),
        (set_level("UNET_C_MULT", -5.0), "no model can be built"),
        (set_level("UNET_N_DOWNSCALES", 65_536), "levels.1: "),
        (set_level("UNET_N_DOWNSCALES", 64), "needs a resolution of at least"),
        (set_level("NUM_LAYERS", [8]), "steps"),
        (set_level("POOLING_TYPE", 5), "a value of an unexpected kind"),
        (set_level("FLOW_SPLIT_TYPES", "os.system"), "unknown split 'os.system'"),
        (set_key("RESOLUTIONS", []), "levels"),
        (set_key("RESOLUTIONS", 32), "a value of an unexpected kind"),
        (set_key("CHANNELS", [3]), "one entry a level"),
        (set_key("CHANNELS", {"a": 1}), "."),
        (set_key("ENDBLOCK_SETTINGS", None), "a value of an unexpected kind"),
        (set_key("GLOBAL_NET_CHANNELS", 65_536), "does not fit the model|must equal"),
        (set_end("CHANNELS", []), "one entry a level|unexpected kind"),
        (set_end("CHANNELS", [-5, -1]), "."),
        (set_end("ENDBLOCK_TOT_CHANNELS", 65_536), "must"),
        (set_end("PERMUTE_SCALING", 0), "mixing_scale"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path, description: dict[str, Any], change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    config = json.loads(json.dumps(description["config"]))
    change(config["MODEL_PARAMETERS"])
    (tmp_path / "settings.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, CheckpointError), match=reason) as caught:
        import_published(GOLDEN / "tiny32.weights.safetensors", "hflow", tmp_path / "run", tmp_path / "settings.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("outer", ["MODEL_PARAMETERS", "GENERAL"])
def test_settings_that_stand_there_twice(tmp_path: Path, description: dict[str, Any], outer: str) -> None:
    hidden = json.loads(json.dumps(description["config"][outer]))
    (tmp_path / "settings.json").write_text(json.dumps(description["config"] | {outer.lower(): hidden}))
    with pytest.raises(ConfigError, match=f"hold {outer} in two spellings; keep one"):
        read_published(GOLDEN / "tiny32.weights.safetensors", tmp_path / "settings.json")


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;pwn\x07", "\x1b[2J" * 200])
@pytest.mark.parametrize("change", [set_level, set_end])
def test_settings_cannot_write_to_the_terminal(
    tmp_path: Path, description: dict[str, Any], change: Callable[..., Callable[[dict[str, Any]], None]], text: str
) -> None:
    config = json.loads(json.dumps(description["config"]))
    change("FLOW_SPLIT_TYPES" if change is set_level else "ENDRES", text)(config["MODEL_PARAMETERS"])
    (tmp_path / "settings.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        read_published(GOLDEN / "tiny32.weights.safetensors", tmp_path / "settings.json")
    message = str(caught.value)
    assert message.isprintable()
    assert "\\x1b[2J" in message
    assert len(message) < len(str(tmp_path)) + 400


def test_masks_may_not_outweigh_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six masks of 2048x2048 are 100 MB, which are in no file and so are held against none."""
    import dataclasses
    import types

    from hflow_rt.models.hflow import FAMILY
    from hflow_rt.models.hflow.config import HFlowConfig
    from hflow_rt.models.hflow.network import HFlow

    small = {"coupling": "cnn", "coupling_channels": 2, "encoder_channels": 2, "decoder_channels": 2, "steps": 1}
    levels = [
        small | {"resolution": side, "channels": 3, "split": "spatial", "skip_channels": int(side < 2048)}
        for side in (2048, 512, 128, 32, 8)
    ]
    levels[0]["steps"] = 6
    end = {"channels": [2], "condition_channels": [], "steps": [1], "coupling_channels": [2], "noise": None}
    config = HFlowConfig.model_validate({"levels": levels, "end": end, "style_channels": 2})
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in HFlow(config).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    reads = dataclasses.replace(FAMILY, read_published=lambda path, settings, part: Published(config, state, {}))
    monkeypatch.setitem(sys.modules, "large_family", types.SimpleNamespace(FAMILY=reads))  # type: ignore[misc]
    monkeypatch.setitem(FAMILIES, "large", "large_family")
    wanted = (
        r"x.bin holds [\d,]+ bytes of weights, and its settings ask for 10\d,\d{3},\d{3} bytes of masks, where at most"
    )
    with pytest.raises(CheckpointError, match=wanted):
        import_published(tmp_path / "x.bin", "large", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("first", "second", "ours"),
    [
        ("blocks.0.learned_upscaler_cond.w", "levels.0.condition.weight", "levels.0.condition.weight"),
        ("blocks.0.blocks.steps.0.coupling.conv_0.w", "blocks.0.blocks.steps.0.coupling.conv_cond_connect.w", "fuse"),
    ],
)
def test_two_names_of_one_tensor(
    tmp_path: Path, weights: dict[str, torch.Tensor], settings_file: Path, first: str, second: str, ours: str
) -> None:
    save_file(weights | {first: torch.zeros(1), second: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"which both mean .*; give a file with one of them") as caught:
        read_published(tmp_path / "x.safetensors", settings_file)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "x.safetensors"))
    assert first in message
    assert second in message
    assert ours in message


def test_names_without_dots(tmp_path: Path, weights: dict[str, torch.Tensor], settings_file: Path) -> None:
    save_file(weights | {"surprise": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit the model: unexpected surprise \[2\]$"):
        import_published(tmp_path / "x.safetensors", "hflow", tmp_path / "run", settings_file)
    save_file(weights | {"spread_end0": torch.zeros(())}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds spread_end0, which is no name of the original's"):
        read_published(tmp_path / "x.safetensors", settings_file)


@pytest.mark.parametrize(("count", "held_out"), [(2, 0), (21, 5)])
def test_spreads_are_those_of_one_large_batch_without_what_is_held_out(
    tmp_path: Path, settings_file: Path, count: int, held_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    pixels[count - held_out :] //= 64
    monkeypatch.setattr("hflow_rt.foreign.importing.open_dataset", lambda *_, **options: Images(pixels, held_out))
    run, source = tmp_path / "run", GOLDEN / "tiny32.weights.safetensors"
    done = import_published(source, "hflow", run, settings_file, tmp_path / "images.npy")
    assert done.learned == {
        "what": "noise scales", "source": str(tmp_path / "images.npy"), "images": count - held_out,
        "held_out": held_out, "split": "by hand",
    }  # fmt: skip
    assert len(done.notes) == bool(held_out)
    assert all("5 held-out images were left out" in note for note in done.notes)
    assert read_metadata(run / "model.safetensors")["learned"] == done.learned
    model: Any = load_model(run / "model.safetensors")
    training = torch.from_numpy(pixels[: count - held_out].transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = model.batch_spreads(model.targets(model.dequantize(training, None)))
    assert len(expected) > 2
    for name, value in expected.items():
        torch.testing.assert_close(getattr(model, f"spread_{name}"), value, rtol=1e-4, atol=0)
        assert value != 1


class Images:
    """Stands in for a data set whose last images are held out."""

    def __init__(self, pixels: Any, held_out: int) -> None:
        self.array = pixels.transpose(0, 3, 1, 2)
        self.held_out = held_out
        self.split_by, self.left_out = "by hand", ""

    def __len__(self) -> int:
        return len(self.array)

    def pixels(self, indices: Any) -> Any:
        return np.ascontiguousarray(self.array[indices])

    def split(self) -> tuple[Any, Any]:
        everything = np.arange(len(self))
        return everything[: len(self) - self.held_out], everything[len(self) - self.held_out :]


@pytest.mark.parametrize("held_out", [0, 1])
def test_one_image_has_no_spread(
    tmp_path: Path, settings_file: Path, held_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.zeros((1 + held_out, 32, 32, 3), np.uint8)
    monkeypatch.setattr("hflow_rt.foreign.importing.open_dataset", lambda *_, **options: Images(pixels, held_out))
    source = GOLDEN / "tiny32.weights.safetensors"
    reason = rf"noise scales need at least 2 images, not 1; give more \(.* has {1 + held_out}, {held_out} held out\)"
    with pytest.raises(DataError, match=reason):
        import_published(source, "hflow", tmp_path / "run", settings_file, tmp_path)
    assert not (tmp_path / "run").exists()


def test_spreads_that_are_not_finite(
    tmp_path: Path, weights: dict[str, torch.Tensor], settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    monkeypatch.setattr("hflow_rt.foreign.importing.open_dataset", lambda *_, **options: Images(pixels, 0))
    encoder = "blocks.0.learned_upscaler.components.0.conv_e1.w"
    save_file(weights | {encoder: weights[encoder] * 1e38}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x.safetensors: noise scales must be finite, and those of .*end0.* are"):
        import_published(tmp_path / "x.safetensors", "hflow", tmp_path / "run", settings_file, tmp_path)
    assert not (tmp_path / "run").exists()
