"""Started twice: one of two processes, which puts its half of a batch through a norm and writes down what it finds."""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import distributed

from hflow_rt.models.nvae.batch_norm import BatchNorm


def main(rank: int, folder: Path) -> None:
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    given = load_file(folder / "given.safetensors")
    x, weights = (given.pop(name)[3 * rank : 3 * rank + 3] for name in ("x", "weights"))
    norm = BatchNorm(3)
    norm.load_state_dict(given)
    x.requires_grad_()
    out = norm(x)
    (weights * out.square()).sum().backward()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in norm.named_parameters()}
    found = {"out": out.detach(), "x": x.grad, **gradients, **norm.state_dict()}
    save_file({name: t.contiguous() for name, t in found.items() if t is not None}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
