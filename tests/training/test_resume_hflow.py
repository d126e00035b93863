"""Exact resume of the real model, whose weights lie channels-last on a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from hflow_rt.runs import checkpoints
from hflow_rt.training.config import load_config
from hflow_rt.training.trainer import train


class Pictures:
    """Random pixels with a fixed split."""

    def __init__(self) -> None:
        self._pixels = np.random.default_rng(0).integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
        self.names = [f"{index:02d}" for index in range(24)]
        self.hash = "pictures"

    def __len__(self) -> int:
        return 24

    def pixels(self, indices: Any) -> Any:
        return self._pixels[np.asarray(indices)]

    def split(self) -> Any:
        return np.arange(20), np.arange(20, 24)


def test_twenty_steps_are_ten_and_ten(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    rates = {"encoders": 5e-4, "decoders": 2e-3, "flows": 5e-3}
    training = {"batch_size": 2, "accumulate": 2, "learning_rates": rates, "ema_warmup_images": 20, "init_images": 8}
    config = load_config(file={"family": "hflow", "model": tiny_settings, "training": training})
    data = Pictures()
    train(config, data, tmp_path / "whole", images=80, device="cpu")
    train(config, data, tmp_path / "parts", images=40, device="cpu")
    train(config, data, tmp_path / "parts", images=80, device="cpu", resume=True)
    whole, parts = (load_file(checkpoints(tmp_path / name)[-1] / "state.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert any(name.startswith("adam/exp_avg_sq/") for name in whole)
    different = [name for name in whole if not bool((whole[name] == parts[name]).all())]
    assert different == []
