"""Peak memory of one training step of Glow, with activations recomputed from outputs and with autograd's own.

    python benchmarks/glow_memory.py [--preset glow-64] [--batch 8] [--out FILE.md]

Each variant runs in a process of its own, whose peak before the step (weights and gradients) is taken off; on a CUDA
device torch's own count is used.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_MIB = 1 << 20


def measure(preset: str, batch: int, steps: int | None, invertible: bool) -> dict[str, Any]:
    """One forward and backward pass in this process."""
    import torch

    from hflow_rt.models.checkpoint import build_model
    from hflow_rt.models.registry import family

    settings = {**family("glow").presets[preset]["model"], "invertible_backward": invertible}
    if steps is not None:
        settings["steps"] = steps
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model("glow", settings).to(device).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    side = settings["resolution"]
    x = torch.rand(batch, 3, side, side, device=device) - 0.5
    before = _peak(device)
    started = time.perf_counter()
    loss = model.loss(x).loss
    loss.backward()  # type: ignore[no-untyped-call]
    value = loss.item()  # waits for the device
    seconds = time.perf_counter() - started
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm().item()
    return {
        "activations_mib": (_peak(device) - before) / _MIB,
        "peak_mib": _peak(device) / _MIB,
        "seconds": seconds,
        "loss": value,
        "gradient_norm": norm,
        "device": device,
    }


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="glow-64")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="*", help="steps a level; several show how memory grows")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(**json.loads(given.one))))
        return
    lines = [
        f"| {given.preset}, batch {given.batch} | steps | over weights and gradients | peak | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for steps in given.steps or [None]:
        for invertible in (False, True):
            job = {"preset": given.preset, "batch": given.batch, "steps": steps, "invertible": invertible}
            command = [sys.executable, __file__, "--one", json.dumps(job)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            name = "recomputed" if invertible else "autograd's"
            lines.append(
                f"| {name}, {found['device']}: loss {found['loss']:.5f}, gradient norm {found['gradient_norm']:.5f} "
                f"| {steps or 'all'} | {found['activations_mib']:.0f} MiB | {found['peak_mib']:.0f} MiB "
                f"| {found['seconds']:.1f} |"
            )
            print(lines[-1], file=sys.stderr)
    table = "\n".join(lines)
    print(table)
    if given.out is not None:
        given.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
