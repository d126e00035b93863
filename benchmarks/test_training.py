"""A training step through the trainer against the straightforward loop over the same model, and what gives how much."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.training.config import load_config
from hflow_rt.training.trainer import train

IMAGES, BATCH = 320, 16


class Pictures:
    """Random pixels; what is measured does not depend on them."""

    def __init__(self, resolution: int) -> None:
        self._pixels = np.random.default_rng(0).integers(0, 256, (64, 3, resolution, resolution), dtype=np.uint8)
        self.names = [f"{index:03d}" for index in range(64)]
        self.hash = "random"

    def __len__(self) -> int:
        return 64

    def pixels(self, indices: Any) -> Any:
        return self._pixels[np.asarray(indices)]

    def split(self) -> Any:
        return np.arange(60), np.arange(60, 64)


def plain_loop(
    config: Any, data: Pictures, *, channels_last: bool = False, fused: bool = False, compiled: bool = False
) -> float:
    """What a training script would do: no average, no log, no checkpoint. Returns seconds of its steps.

    Each option is one thing that the script could do to be faster; compiling is not part of the seconds.
    """
    from hflow_rt.models.checkpoint import build_model

    torch.manual_seed(0)
    model = build_model(config.family, config.model).train()
    model.initialize(torch.from_numpy(data.pixels(range(60))), torch.Generator().manual_seed(0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    loss_of = torch.compile(model.loss) if compiled else model.loss
    rates = config.training.learning_rates
    optimizer = torch.optim.Adam(
        [{"params": group, "lr": rates[name]} for name, group in model.parameter_groups().items()], fused=fused
    )
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for step in range(-2 if compiled else 0, IMAGES // BATCH):
        if step == 0:
            started = time.perf_counter()
        indices = np.arange(step * BATCH, (step + 1) * BATCH) % 60
        x = model.dequantize(torch.from_numpy(data.pixels(indices)), generator)
        x += 0.005 * torch.randn(x.shape, generator=generator)
        loss = loss_of(x.contiguous(memory_format=layout)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 50)
        optimizer.step()
    return time.perf_counter() - started


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns of what it uses itself
def test_training_step(benchmark: Any, record: Any, tmp_path: Path) -> None:
    far = 10**9
    settings = [f"training.{key}_every_images={far}" for key in ("sample", "evaluate", "checkpoint")]
    overrides = [f"training.batch_size={BATCH}", "training.evaluate_images=1", *settings]
    config = load_config("hflow-demo", overrides=overrides)
    data = Pictures(config.resolution)
    levers = {
        "straightforward loop": {},
        "fused optimiser": {"fused": True},
        "channels-last": {"channels_last": True},
        "channels-last, fused optimiser": {"channels_last": True, "fused": True},
        "channels-last, fused optimiser, torch.compile": {"channels_last": True, "fused": True, "compiled": True},
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*levers, "hflow-rt train"]}
    for turn in range(3):
        for name, options in levers.items():
            seconds[name].append(plain_loop(config, data, **options))
        result = train(config, data, tmp_path / str(turn), images=IMAGES, device="cpu")
        seconds["hflow-rt train"].append(IMAGES / result.images_per_second)
    record(f"hflow-demo training, {IMAGES // BATCH} steps of {BATCH}", seconds)
    benchmark.pedantic(plain_loop, args=(config, data), rounds=1, iterations=1)
