"""Started by `accelerate launch`: trains the toy and lets every process write down its own weights.

With the name of a family: its tiny model, and all that trains beside it.
"""

import sys
from pathlib import Path

from conftest import ToyImages
from safetensors.torch import save_file

from hflow_rt.models.checkpoint import build_model
from hflow_rt.models.registry import FAMILIES, family
from hflow_rt.training import trainer
from hflow_rt.training.config import load_config
from hflow_rt.training.run import Run

FAMILIES["toy"] = "toy_family"


def main(out: Path, name: str | None = None) -> None:
    save = Run.save

    def also_here(self: Run) -> None:
        save(self)
        trained = self.plan.model if name is None else self.plan
        state = {name: value.contiguous().clone() for name, value in trained.state_dict().items()}
        save_file(state, out / f"rank{self.processes.rank}.safetensors")

    Run.save = also_here  # type: ignore[method-assign]
    overrides = ["training.images=80", "training.ema_warmup_images=0"]
    if name is None:
        config, images = load_config("toy", overrides=overrides), ToyImages()
    else:
        config = load_config(file={"family": name, **family(name).tiny}, overrides=overrides)
        images = ToyImages(side=config.resolution)
        classes = next(iter(build_model(name, config.model).conditions().values()), ("all",))
        images.names = [f"{classes[index % len(classes)]}/{name}" for index, name in enumerate(images.names)]
    result = trainer.train(config, images, out / "run", device="cpu")
    assert result.images == 80


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
