"""Started by `accelerate launch`: trains the toy and lets every process write down its own weights."""

import sys
from pathlib import Path

from conftest import ToyImages
from safetensors.torch import save_file

from hflow_rt.models.registry import FAMILIES
from hflow_rt.training import trainer
from hflow_rt.training.config import load_config
from hflow_rt.training.run import Run

FAMILIES["toy"] = "toy_family"


def main(out: Path) -> None:
    save = Run.save

    def also_here(self: Run) -> None:
        save(self)
        state = {name: value.clone() for name, value in self.plan.model.state_dict().items()}
        save_file(state, out / f"rank{self.processes.rank}.safetensors")

    Run.save = also_here  # type: ignore[method-assign]
    overrides = ["training.images=80", "training.ema_warmup_images=0"]
    result = trainer.train(load_config("toy", overrides=overrides), ToyImages(), out / "run", device="cpu")
    assert result.images == 80


if __name__ == "__main__":
    main(Path(sys.argv[1]))
