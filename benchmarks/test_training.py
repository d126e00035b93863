"""A training step through the trainer against the straightforward loop over the same model and batches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hflow_rt.training.config import load_config
from hflow_rt.training.trainer import train

IMAGES, BATCH = 160, 16


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


def plain_loop(config: Any, data: Pictures) -> None:
    """What a training script would do: no average, no log, no checkpoint."""
    from hflow_rt.models.checkpoint import build_model

    torch.manual_seed(0)
    model = build_model(config.family, config.model).train()
    model.initialize(torch.from_numpy(data.pixels(range(60))), torch.Generator().manual_seed(0))
    rates = config.training.learning_rates
    optimizer = torch.optim.Adam(
        [{"params": group, "lr": rates[name]} for name, group in model.parameter_groups().items()]
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(IMAGES // BATCH):
        indices = np.arange(step * BATCH, (step + 1) * BATCH) % 60
        x = model.dequantize(torch.from_numpy(data.pixels(indices)), generator, 0.005)
        loss = model.loss(x).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 50)
        optimizer.step()


def test_training_step(benchmark: Any, take_turns: Any, record: Any, tmp_path: Path) -> None:
    far = 10**9
    settings = [f"training.{key}_every_images={far}" for key in ("sample", "evaluate", "checkpoint")]
    config = load_config(
        "hflow-demo", overrides=[f"training.batch_size={BATCH}", "training.evaluate_images=1", *settings]
    )
    data = Pictures(config.resolution)
    runs = iter(range(10**6))

    def ours() -> None:
        train(config, data, tmp_path / str(next(runs)), images=IMAGES, device="cpu")

    seconds = take_turns({"straightforward loop": lambda: plain_loop(config, data), "hflow-rt train": ours}, 3)
    speeds = {name: round(IMAGES / min(values), 1) for name, values in seconds.items()}
    record("hflow-demo training, 10 steps of 16 and set-up", seconds, images_per_second=speeds["hflow-rt train"])
    benchmark.pedantic(ours, rounds=1, iterations=1)
