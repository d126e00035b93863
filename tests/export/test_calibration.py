"""Calibration before export: what is asked for, how it is told, and that it happens once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.export.bundle import export_bundle
from hflow_rt.export.calibration import Calibration, calibrate, check_calibrated, parse_calibration
from hflow_rt.export.making import GraphOptions, wanted_graphs
from hflow_rt.manifest import read_manifest
from hflow_rt.models.checkpoint import load_model, read_metadata, save_model
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.model import NVAE
from hflow_rt.models.nvae.presets import TINY
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import find_bundle

ASKED = "std=0.6,steps=8"


def test_what_can_be_asked_for() -> None:
    assert parse_calibration("std=0.6") == Calibration(("0.6",), 500, 0)
    whole = Calibration(("0.6", "z1=0.9"), 3, 7)
    assert parse_calibration("std=0.6, z1=0.9, steps=3,seed=7") == parse_calibration(whole.words()) == whole


@pytest.mark.parametrize("text", ["0.6", "std=0.6,steps=0", "steps=x", ""])
def test_what_cannot(text: str) -> None:
    with pytest.raises(ConfigError, match="--calibrate"):
        parse_calibration(text)


def test_calibrated_figures_are_of_calibrated_weights() -> None:
    check_calibrated("std=0.6,z1=0.9,steps=3,seed=7", ["0.6", "z1=0.9"])
    with pytest.raises(ConfigError, match=r"was not calibrated, .* 'hflow-rt export RUN --calibrate std=0\.6,z1=0\.9'"):
        check_calibrated(None, ["0.6", "z1=0.9"])
    with pytest.raises(ConfigError, match=r"for samples of std 0\.6, not 0\.9; omit --calibrated"):
        check_calibrated("std=0.6,steps=3,seed=7", ["0.9"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = {**TINY["model"], "groups": (1, 1), "flows": 0}
    folder, model = tmp_path_factory.mktemp("run"), NVAE(NVAEConfig(**small))
    save_model(folder / "model.safetensors", "nvae", model, model.state_dict(), {"images": 0})
    return folder


def test_statistics_of_the_decoder_are_those_of_samples(run: Path) -> None:
    model, same, before = (load_model(run / "model.safetensors") for _ in range(3))
    assert calibrate(model, {}, ASKED) == {"calibrated": "std=0.6,steps=8,seed=0"}
    calibrate(same, {}, ASKED)
    assert not model.training
    for name, value in before.state_dict().items():
        now = model.state_dict()[name]
        assert torch.equal(now, same.state_dict()[name])
        moved = ".running_" in name and name.startswith(("decoder.", "after."))
        assert torch.equal(now, value) != (moved or (name.startswith(("decoder.", "after.")) and "num_batches" in name))


def test_bad_figures_are_refused(run: Path, tiny_model: Any) -> None:
    model = load_model(run / "model.safetensors")
    with pytest.raises(DataError, match="std must be a finite number > 0; found '0'"):
        calibrate(model, {}, "std=0")
    with pytest.raises(DataError, match="unknown latent 'z9'"):
        calibrate(model, {}, "z9=1")
    with pytest.raises(ConfigError, match="nothing to calibrate; omit --calibrate"):
        calibrate(tiny_model, {}, ASKED)


@pytest.mark.slow
def test_a_bundle_is_of_the_calibrated_model_and_stays_so(run: Path) -> None:
    images, bundle = np.full((1, 3, 8, 8), 0.5, np.float32), run / "bundle"
    manifest = export_bundle(run / "model.safetensors", bundle, images, "forward", calibration=ASKED, std=("0.6",))
    assert manifest.verified
    assert manifest.checkpoint["calibrated"] == "std=0.6,steps=8,seed=0"
    model = load_model(run / "model.safetensors")
    calibrate(model, {}, ASKED)
    kept = load_model(bundle / "model.safetensors").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert find_bundle(run).outdated is None
    known, _, _ = wanted_graphs(run / "model.safetensors", bundle, GraphOptions())
    assert (known.calibrate, known.std) == ("std=0.6,steps=8,seed=0", ["0.6"])
    again = read_metadata(bundle / "model.safetensors")
    assert calibrate(load_model(bundle / "model.safetensors"), again, ASKED) is None
    with pytest.raises(ConfigError, match=r"calibrated at std=0\.6,steps=8,seed=0; export the run"):
        calibrate(load_model(bundle / "model.safetensors"), again, "std=0.9")
    with pytest.raises(ConfigError, match="was calibrated at"):
        wanted_graphs(bundle / "model.safetensors", bundle, GraphOptions(calibrate="none"))
    undone, _, _ = wanted_graphs(run / "model.safetensors", bundle, GraphOptions(calibrate="none"))
    assert undone.calibrate == "none"
    assert read_manifest(bundle) == manifest
    with load(bundle) as session:
        check_calibrated(session.calibrated, session.std)
