"""Started by `accelerate launch`: trains tiny models one after another, and every process writes down its own.

Of the toy its weights; of a registered family all that trains beside them, too.
"""

import sys
from pathlib import Path

from conftest import ToyImages
from safetensors.torch import save_file

from hflow_rt.models.checkpoint import build_model
from hflow_rt.models.registry import FAMILIES, family
from hflow_rt.training import trainer
from hflow_rt.training.config import load_config
from hflow_rt.training.processes import Processes
from hflow_rt.training.run import Run

FAMILIES["toy"] = "toy_family"


SAVE, LEAVE = Run.save, Processes.close


def main(out: Path, name: str) -> None:
    def also_here(self: Run) -> None:
        SAVE(self)
        trained = self.plan.model if name == "toy" else self.plan
        state = {name: value.contiguous().clone() for name, value in trained.state_dict().items()}
        save_file(state, out / f"{name}-{self.processes.rank}.safetensors")

    Run.save = also_here  # type: ignore[method-assign]
    overrides = ["training.images=80", "training.ema_warmup_images=0"]
    if name == "toy":
        config, images = load_config("toy", overrides=overrides), ToyImages()
    else:
        config = load_config(file={"family": name, **family(name).tiny}, overrides=overrides)
        images = ToyImages(side=config.resolution)
        classes = next(iter(build_model(name, config.model).conditions().values()), ("all",))
        images.names = [f"{classes[index % len(classes)]}/{name}" for index, name in enumerate(images.names)]
    result = trainer.train(config, images, out / name, device="cpu")
    assert result.images == 80


if __name__ == "__main__":
    for each in sys.argv[2:]:
        # a group of processes that has been left cannot be entered again
        Processes.close = LEAVE if each == sys.argv[-1] else lambda self: None  # type: ignore[method-assign]
        main(Path(sys.argv[1]), each)
