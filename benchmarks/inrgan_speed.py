"""INR-GAN's forward pass in float32: the exported graph against the plain generator, eager and compiled.

    python benchmarks/inrgan_speed.py [--presets inrgan-emoji inrgan-256] [--batches 1 16] [--memory 50]
        [--bundles FOLDER] [--out FILE.md]
    python benchmarks/inrgan_speed.py --dry-run        the same at a tiny size; figures mean nothing

The plain generator concatenates and computes its embeddings anew in every call. All take turns on the same latents.
Then the peak memory that calls of each add, an image, in processes of their own, also at a batch of `--memory`.
"""

import argparse
import gc
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import take_turns

from hflow_rt.conditions import in_turn
from hflow_rt.export.bundle import export_bundle
from hflow_rt.models.checkpoint import build_model, save_model
from hflow_rt.models.inrgan.model import LABELS
from hflow_rt.models.registry import family
from hflow_rt.runtime import load

VARIANTS = ("eager", "compiled", "onnx")
WANTED = {"eager": 3.0, "compiled": 1.5}


def made(preset: str, folder: Path) -> Path:
    """A bundle of random weights, with w_avg as a trained one has it; one that is there is taken for it."""
    if (folder / "bundle").exists():
        return folder
    torch.manual_seed(0)
    found = family("inrgan")
    model: Any = build_model("inrgan", found.presets.get(preset, found.tiny)["model"])
    with torch.no_grad():
        labels = in_turn(model.conditions(), range(1000)).get(LABELS)
        drawn = torch.randn(1000, model.config.z_dim)
        model.w_avg.copy_(model.mapping(drawn, None if labels is None else torch.from_numpy(labels)).mean(0))
    side = model.resolution
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "model.safetensors", "inrgan", model, model.state_dict(), {})
    export_bundle(folder / "model.safetensors", folder / "bundle", np.zeros((1, 3, side, side), np.float32))
    return folder


def call_of(variant: str, folder: Path, batch: int) -> Callable[[], Any]:
    """One forward pass of `batch` images."""
    session = load(folder, "onnx" if variant == "onnx" else "torch", "cpu")
    (latents,) = session.draw(range(batch), batch=batch)
    if variant == "onnx":
        return lambda: session.forward(latents)
    from hflow_rt.models.checkpoint import load_model

    model: Any = load_model(folder / "model.safetensors")
    plain = model.graphs()["forward"].reference
    plain = torch.compile(plain, dynamic=False) if variant == "compiled" else plain
    slots, told = float(model.config.slots), [torch.from_numpy(latents[name]) for name in model.conditions()]
    z, psi = torch.from_numpy(latents["z"]), torch.full((batch,), model.config.psi)
    inputs = z, psi, torch.full((batch,), slots), *told

    def call() -> Any:
        with torch.inference_mode():
            return plain(*inputs)

    return call


def peak_of(variant: str, folder: Path, batch: int) -> float:
    """MiB an image that two calls add to what the process has before them; of a compiled one with what compiling takes.

    Linux counts it, and forgets the peak of what came before.
    """
    call = call_of(variant, folder, batch)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _mib("VmRSS")
    for _ in range(2):
        call()
    return (_mib("VmHWM") - before) / batch


def _mib(what: str) -> float:
    (found,) = re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) / 1024


def _peak(variant: str, folder: Path, batch: int) -> str:
    job = [sys.executable, __file__, "--one", json.dumps([variant, str(folder), batch])]
    done = subprocess.run(job, check=False, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        return "out of memory"
    if done.returncode:
        raise RuntimeError(done.stderr)
    return f"{float(done.stdout):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["inrgan-emoji", "inrgan-256"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--memory", type=int, default=50, help="images of a call whose memory is measured too")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bundles", type=Path, help="keep exported bundles there, and take those that are there")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        variant, folder, batch = json.loads(given.one)
        print(peak_of(variant, Path(folder), batch))
        return
    presets, fill = (["tiny"], 0.0) if given.dry_run else (given.presets, 1.0)
    lines = ["| preset | batch | | images/s | of onnx, wanted | MiB an image |", "|---|---:|---|---:|---|---:|"]

    def say(*cells: str) -> None:
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)

    with tempfile.TemporaryDirectory() as work:
        for preset in presets:
            folder = made(preset, (given.bundles or Path(work)) / preset)
            for batch in given.batches:
                seconds = take_turns({name: call_of(name, folder, batch) for name in VARIANTS}, given.rounds, fill)
                best = {name: statistics.median(found) for name, found in seconds.items()}
                for name in VARIANTS:
                    ratio = f"{best[name] / best['onnx']:.2f}x" + (f", {WANTED[name]}x" if name in WANTED else "")
                    say(preset, str(batch), name, f"{batch / best[name]:.1f}", ratio, _peak(name, folder, batch))
            for name in VARIANTS:
                say(preset, str(given.memory), name, "", "", _peak(name, folder, given.memory))
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
